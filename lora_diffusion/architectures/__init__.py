"""Model families as data: components, module paths, blocks, target modules, and the detection of a family."""
