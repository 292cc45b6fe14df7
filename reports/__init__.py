"""The rows that measurements write, and the tables and figures made from them. Imports no package of this project but
flashjvp_commands."""

from flashjvp_commands.extras import needed_by_commands

needed_by_commands("reports", "eval")
