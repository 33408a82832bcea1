"""Plans: which box of which source goes where, worked out once for all layers and experts that lie alike. Pure.

``join.py`` lines up two sides of stored tensors in patterns × instances. What a job makes of that is its own choice of
holders: ``plan.py`` (files and load: the first holder, replicas compared; diff: every pair), ``reshard.sync`` (the least loaded
sender). ``tiles.py`` cuts a plan for workers with little memory, ``batches.py`` for files that are fetched by ranges.
"""
