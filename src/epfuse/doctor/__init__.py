"""`epfuse doctor`: what epfuse finds on a machine, what of it is wrong, and what mends it.

checks.py     the list: what is looked at, in which order, and for how long
examine.py    runs it in a child process, so that what crashes or hangs costs one line
child.py      that process
finding.py    a line, and all lines: the form of ``--json``
redact.py     takes out what is nobody's business
software.py, gpu.py, compiling.py, servers.py, call.py    the checks
"""
