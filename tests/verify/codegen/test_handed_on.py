"""Loops that hand a number on from one name to another are found in MLIR."""

import pytest

from verify.codegen.handed_on import handed_on

LOOP = """\
    %a:2 = scf.for %i = %c0 to %c2 step %c1 iter_args(%first = %x, %end = %y) -> (i32, i32)  : i32 {
      scf.for %j = %first to %end step %c1  : i32 {
        scf.yield
      } loc(#loc1)
      %z = scf.if %p -> (i32) {
        scf.yield %end : i32
      } else {
        scf.yield %first : i32
      }
      scf.yield {yields} : i32, i32 loc(#loc2)
    }
    %b = scf.for %i = %c0 to %c2 step %c1 iter_args(%only = %a#0) -> (i32)  : i32 {
      scf.yield %only : i32
    }
"""


@pytest.mark.parametrize(
    ("yields", "found"),
    [
        ("%end, %z", "%first = %end"),
        ("%z, %first", "%end = %first"),
        ("%end, %first", "%first = %end, %end = %first"),
        ("%first, %end", ""),
        ("%z, %w#1", ""),
    ],
)
def test_numbers_that_are_handed_on(yields: str, found: str) -> None:
    assert handed_on(LOOP.replace("{yields}", yields)) == found


def test_text_without_loops() -> None:
    assert handed_on("module {\n  tt.return\n}\n") == ""
