"""The engine `ray`: workers on the GPUs of a Ray cluster, without a shared file system.

`host.py` runs beside a worker on its node, with its files in `node_files.py`. `remote.py` is its parent's
side, and `transfer.py` moves files between the two. `pool.py` decides how many workers run on which of the
nodes (`nodes.py`), and `opening.py` opens one if nothing differs (`alike.py`). Only `engine.py` imports Ray;
`address.py` finds out, before it does, whether a cluster answers.
"""
