"""What all commands of tvm_ref, verify, bench and reports share. All but terminal.py needs the standard library alone.

- ending.py: how a command ends: exit status, one line for an error, Ctrl-C and SIGTERM.
- children.py: the processes that a command starts, each in a group of its own, so that all of them can be ended.
- arguments.py: types of arguments, and help that fits the terminal.
- outputs.py: `--out`, checked before the work.
- extras.py: one line that says what to install.
- terminal.py: tables of which no digit is cut, and bars, with rich.
- entry.py: the entry points of the wheel, such as flashjvp-verify.

In the wheel the folder tools/ here holds verify, bench and reports, so that no such names stand in site-packages.
"""
