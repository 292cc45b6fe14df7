"""What the wheel holds. verify, bench and reports become subfolders of flashjvp_commands: site-packages is shared, and
other projects have packages of these names. flashjvp_commands/entry.py finds them in both places."""

from setuptools import find_packages, setup

TOOLS = ("verify", "bench", "reports")

setup(
    packages=[
        *find_packages(include=["flashjvp", "flashjvp.*", "flashjvp_commands", "tvm_ref", "tvm_ref.*"]),
        *(
            f"flashjvp_commands.{package}"
            for tool in TOOLS
            for package in (tool, *(f"{tool}.{part}" for part in find_packages(tool)))
        ),
    ],
    package_dir={f"flashjvp_commands.{tool}": tool for tool in TOOLS},
)
