"""The engine `ray`: workers on the GPUs of a Ray cluster, without a shared file system.

`host.py` runs beside a worker on its node, `remote.py` is its parent's side, `transfer.py` moves files
between the two, `pool.py` decides how many workers run on which node, and only `engine.py` imports Ray.
"""
