"""User tasks around training: dry run, dataset check, training with a report, distillation, sizes of methods."""
