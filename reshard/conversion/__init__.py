"""A conversion from plan to folder: job, journal, output, what an earlier run left, and the step in which a folder appears."""
