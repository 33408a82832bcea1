"""diff: two checkpoints, element by element; what is said about them (`difference`), and where in a tensor they differ (`heat`)."""
