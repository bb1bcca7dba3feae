"""A patch of an installed vLLM, for images where no plugin can be installed: it calls the plugin's `register` itself.

| file | what it does |
| --- | --- |
| `block.py` | the lines that are added, and how a file looks with and without them |
| `site.py` | an installed vLLM and what its wheel says of the files (RECORD) |
| `lock.py` | one process at a time |
| `swap.py` | one file, replaced atomically, and brought back |
| `journal.py` | which swaps are under way, so that a crash is undone by the next call |
| `run.py` | status, apply, verify, revert |
"""
