"""Processes that live long give back what they no longer use; each in a process of its own, as it changes all of it."""

from __future__ import annotations

import subprocess
import sys

PRELUDE = """
import collections, gc, psutil, sys, weakref
from tasks.thrift import collect_all, keep, settle, tidy

class Remains:
    def __init__(self):
        self.itself, self.payload = self, bytes(400)

def mib():
    return psutil.Process().memory_info().rss / 2**20
"""


def run(program: str, *arguments: str) -> str:
    command = [sys.executable, "-c", PRELUDE + program, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.strip()


REMAINS_PILE_UP = """
def gone():
    global num_alive
    num_alive -= 1

imports = [[] for _ in range(400_000)]
gc.collect()
if sys.argv[1] == "settled":
    settle()
in_use = collections.deque(maxlen=10_000)  # long enough to count as old
most = num_alive = 0
for _ in range(100_000):
    in_use.append(Remains())
    num_alive += 1
    weakref.finalize(in_use[-1], gone)
    most = max(most, num_alive)
print(most - len(in_use))
"""


def test_remains_that_refer_to_themselves_do_not_pile_up_beside_half_a_million_objects_that_stay():
    settled, unsettled = (int(run(REMAINS_PILE_UP, kind)) for kind in ("settled", "not"))

    assert settled < unsettled / 4


def test_a_model_that_was_there_when_the_process_settled_can_still_leave():
    alive = run("""
model = Remains()
seen = weakref.ref(model)
settle()
del model
gc.collect()
frozen = seen() is not None
collect_all()
print(frozen, seen() is not None, gc.get_freeze_count() > 0)
""")

    assert alive == "True False True"


HEAP_SHRINKS = """
if sys.argv[1] == "settled":
    settle()
large = bytes(2**24)
del large  # from now on malloc would keep twice as much at the top of its heap
blocks = [None] * 400
mib()
before = mib()
for number in range(400):
    blocks[number] = bytearray(60_000)
for number in range(400):
    blocks[number] = None
print(mib() - before)
"""


def test_a_heap_that_was_large_once_is_given_back():
    settled, unsettled = (float(run(HEAP_SHRINKS, kind)) for kind in ("settled", "not"))

    assert settled < 5
    assert unsettled > 20


PAGES_BETWEEN = """
if sys.argv[1] == "settled":
    settle()
blocks, pins = [None] * 400, [None] * 400
mib()
before = mib()
for number in range(400):
    blocks[number], pins[number] = bytearray(60_000), bytearray(600)
blocks[:] = [None] * 400
gc.disable()
remains = weakref.ref(Remains())
tidy()
print(mib() - before, remains() is None)
"""


def test_between_clips_free_pages_and_remains_go_but_only_where_looking_costs_nothing():
    settled, unsettled = (run(PAGES_BETWEEN, kind).split() for kind in ("settled", "not"))

    assert float(settled[0]) < 6
    assert settled[1] == "True"
    assert float(unsettled[0]) > 20
    assert unsettled[1] == "False"


KEEPING = """
if sys.argv[1] == "settled":
    settle()
before = gc.get_freeze_count()
gone, model = weakref.ref(Remains()), Remains()
seen = weakref.ref(model)
keep()
kept = gc.get_freeze_count() > before
del model
collect_all()
print(kept, gone() is None, seen() is None)
"""


def test_what_comes_later_to_a_settled_process_is_not_looked_through_again_either_and_can_leave():
    settled, unsettled = (run(KEEPING, kind) for kind in ("settled", "not"))

    assert settled == "True True True"
    assert unsettled.startswith("False")
