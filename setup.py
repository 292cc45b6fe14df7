"""What the wheel holds.

site-packages is shared, and other projects have packages called verify, bench or reports. So these three become
subfolders of flashjvp_commands/tools, and a .pth file puts that folder at the end of Python's path: `python -m verify`
works, no file of another project is replaced, and a package of the same name that anyone else installed comes first.
"""

from pathlib import Path
from typing import Any

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

TOOLS = ("verify", "bench", "reports")
HOME = "flashjvp_commands.tools"
PTH = "flashjvp_commands.pth"


class BuildWithPath(build_py):
    """Also writes the .pth file, beside the packages. An editable install has none: a checkout is a path of its own."""

    def run(self) -> None:
        super().run()
        if not self.editable_mode:
            Path(self.build_lib, PTH).write_text(HOME.replace(".", "/") + "\n")

    def get_outputs(self, *arguments: Any, **options: Any) -> list[str]:
        return [*super().get_outputs(*arguments, **options), str(Path(self.build_lib, PTH))]


setup(
    cmdclass={"build_py": BuildWithPath},
    packages=[
        *find_packages(include=["flashjvp", "flashjvp.*", "flashjvp_commands", "tvm_ref", "tvm_ref.*"]),
        *(
            f"{HOME}.{package}"
            for tool in TOOLS
            for package in (tool, *(f"{tool}.{part}" for part in find_packages(tool)))
        ),
    ],
    package_dir={f"{HOME}.{tool}": tool for tool in TOOLS},
)
