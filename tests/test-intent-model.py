#!/usr/bin/env python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors
"""All interleavings of the protocol of common/dirty/intent.c.

Writers and a thread that stores are cut into the steps between which
others can see a difference, and every order of them is tried, with every
failure of I/O, and what is stored changing one region at a time, as a
crash may leave it.  In every state that can be reached all writes which
were passed on must be in the stored bitmap or in the stored intent.

The same search must find a mistake in each of the protocols that are
wrong on purpose: else it would not mean much.
"""

import sys

import qf

# Each writer's writes: the region of each.  Each write has a bit of its
# own in the bitmap.
WRITERS = ((0, 1), (0,))
STORES = 2
REGIONS = (1, 2)


def bit_of(writer, number):
    return 1 << (writer * 2 + number)


class State:
    """What memory and disk hold, and where each thread is.  Immutable:
    steps make new ones."""
    __slots__ = ("bitmap", "epochs", "current", "stable", "lock",
                 "stored", "intent", "passed", "threads")

    def __init__(self, **members):
        for name, value in members.items():
            setattr(self, name, value)

    def key(self):
        return tuple(getattr(self, name) for name in self.__slots__)

    def but(self, thread=None, local=None, **members):
        new = State(**{name: getattr(self, name) for name in self.__slots__})
        for name, value in members.items():
            setattr(new, name, value)
        if thread is not None:
            threads = list(new.threads)
            threads[thread] = local
            new.threads = tuple(threads)
        return new


def start():
    threads = [("mark", 0) for _ in WRITERS] + [("begin", 0)]
    return State(bitmap=0, epochs=(0, 0), current=0, stable=0, lock=None,
                 stored=0, intent=0, passed=0, threads=tuple(threads))


def with_epoch(epochs, which, value):
    return (value, epochs[1]) if which == 0 else (epochs[0], value)


# A thread's place is (label, number of its write or store, values ...).
# Each function gives the states that one step leads to.

def write_steps(state, thread, protocol):
    label, number, *values = state.threads[thread]
    if number >= len(WRITERS[thread]):
        return
    region = REGIONS[WRITERS[thread][number]]
    bit = bit_of(thread, number)

    def go(label, *values, **members):
        return state.but(thread, (label, number, *values), **members)

    def finish(**members):
        return state.but(thread, ("mark", number + 1), **members)

    def passed(**members):
        return finish(passed=state.passed | bit, **members)

    if label == "mark":
        if protocol == "mark-late":
            yield go("see")
        else:
            yield go("see", bitmap=state.bitmap | bit)
    elif label == "see":
        yield go("epoch", state.current)
    elif label == "epoch":
        epoch, = values
        epochs = with_epoch(state.epochs, epoch, state.epochs[epoch] | region)
        yield go("late" if protocol == "mark-late" else "stable?",
                 epochs=epochs)
    elif label == "late":
        yield go("stable?", bitmap=state.bitmap | bit)
    elif label == "stable?":
        if state.stable & region:
            yield passed()
        else:
            yield go("lock")
    elif label == "lock" and state.lock is None:
        yield go("see again", lock=thread)
    elif label == "see again":
        yield go("epoch again", state.current)
    elif label == "epoch again":
        epoch, = values
        yield go("stable again?", epochs=with_epoch(
            state.epochs, epoch, state.epochs[epoch] | region))
    elif label == "stable again?":
        if state.stable & region:
            yield passed(lock=None)
        else:
            yield go("copy")
    elif label == "copy":
        if protocol == "one-epoch":
            yield go("write", state.epochs[state.current])
        else:
            yield go("copy 2", state.epochs[0])
    elif label == "copy 2":
        yield go("write", values[0] | state.epochs[1])
    elif label == "write":
        intent, = values
        if protocol == "stable-early" and not state.stable & intent == intent:
            yield go("write", intent, stable=state.stable | intent)
            return
        for region in REGIONS:           # the disk, one at a time
            if (state.intent ^ intent) & region:
                yield go("write", intent, intent=state.intent ^ region)
        yield finish(lock=None)          # it fails
        if state.intent == intent:
            yield go("say", intent)
    elif label == "say":
        yield passed(stable=state.stable | values[0], lock=None)


def store_steps(state, thread, protocol):
    label, number, *values = state.threads[thread]
    if number >= STORES:
        return

    def go(label, *values, **members):
        return state.but(thread, (label, number, *values), **members)

    def finish(**members):
        return state.but(thread, ("begin", number + 1), **members)

    if label == "begin" and protocol == "copy-first":
        yield go("begin late", state.bitmap)
    elif label == "begin late":
        yield go("save", values[0], current=state.current ^ 1)
    elif label == "begin" and protocol == "clear-early":
        yield go("copy", current=state.current ^ 1,
                 epochs=with_epoch(state.epochs, state.current, 0))
    elif label == "begin":
        yield go("copy", current=state.current ^ 1)
    elif label == "copy":
        yield go("save", state.bitmap)
    elif label == "save":
        copy, = values
        rest = copy & ~state.stored
        while rest:                      # the disk, one bit at a time
            yield go("save", copy, stored=state.stored | (rest & -rest))
            rest &= rest - 1
        yield finish()                   # it fails
        if copy & ~state.stored == 0:
            yield go("lock")
    elif label == "lock" and state.lock is None:
        yield go("forget", lock=thread)
    elif label == "forget":
        if protocol == "keep-stable":
            yield go("copy epoch")
        else:
            yield go("copy epoch", stable=0)
    elif label == "copy epoch":
        yield go("write", state.epochs[state.current])
    elif label == "write":
        intent, = values
        for region in REGIONS:
            if (state.intent ^ intent) & region:
                yield go("write", intent, intent=state.intent ^ region)
        yield finish(lock=None)          # it fails
        if state.intent == intent:
            yield go("say", intent)
    elif label == "say":
        yield go("clear", stable=state.stable | values[0])
    elif label == "clear":
        yield finish(lock=None, epochs=with_epoch(
            state.epochs, state.current ^ 1, 0))


def is_covered(state):
    """Has a crash now lost nothing?"""
    for thread, writes in enumerate(WRITERS):
        for number, region in enumerate(writes):
            bit = bit_of(thread, number)
            if state.passed & bit and not state.stored & bit \
                    and not state.intent & REGIONS[region]:
                return False
    return True


def steps(state, protocol):
    for thread in range(len(WRITERS)):
        yield from write_steps(state, thread, protocol)
    yield from store_steps(state, len(WRITERS), protocol)


def search(protocol):
    """(states seen, whether one of them loses a write)."""
    first = start()
    seen = {first.key()}
    todo = [first]
    while todo:
        state = todo.pop()
        if not is_covered(state):
            return len(seen), True
        for successor in steps(state, protocol):
            key = successor.key()
            if key not in seen:
                seen.add(key)
                todo.append(successor)
    return len(seen), False


def test(_tmp):
    number, lost = search("right")
    print(f"{number} states", flush=True)
    qf.check(not lost, "the protocol loses a write")
    qf.check(number > 10000, "the model does hardly anything")
    for protocol in ("mark-late", "one-epoch", "stable-early", "copy-first",
                     "keep-stable", "clear-early"):
        number, lost = search(protocol)
        print(f"{protocol}: {'found' if lost else 'NOT found'} after "
              f"{number} states", flush=True)
        qf.check(lost, f"nothing is wrong with {protocol}")


sys.dont_write_bytecode = True
qf.main(test)
