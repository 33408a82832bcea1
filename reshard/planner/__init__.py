"""Plans: which box of which source goes where, worked out once for all layers and experts that lie alike. Pure.

``pieces.py`` intersects two lists of boxes; ``join.py`` lines up two sides of stored tensors in patterns × instances and
counts that every element has its place. What a job makes of that is its own choice of holders: ``copies.py`` (files, load:
the first holder, replicas compared), ``reshard.sync`` (the least loaded sender), ``diff`` (every pair of holders).
"""
