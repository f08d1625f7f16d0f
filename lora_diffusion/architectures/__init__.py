"""Model families: their components, module paths, blocks and targets."""
