"""Read and write adapter files, with one module for each key layout (kohya, PEFT, cloneofsimo, ...)."""
