"""Experiments on Terminal Velocity Matching and its relatives: `python -m tvm_ref.experiments NAME --out FOLDER`.

Each is one small file: what is varied, and the figure that shows it. cells.py has what all are made of, training.py and
measures.py cells that train a network and what is measured of it, runner.py runs cells and keeps what is finished,
results.py the rows, drawing.py what the figures share, bases.py the networks that are trained, catalogue.py the list.
"""

from flashjvp_commands.extras import needed_by_commands

needed_by_commands("tvm_ref.experiments", "train", "eval")
