#!/usr/bin/python3
# SPDX-License-Identifier: BSD-3-Clause
# Copyright the nbdkit-qcow2-filters authors

"""Measure our filters against the raw disk and against other servers.

Within a repetition the contenders run in turn, each repetition begins
with another of them, and all repetitions of a case lie together: so what
else the machine does, and how warm it is, hits all of them alike.
"""

import argparse
import contextlib
import functools
import json
import os
import shlex
import shutil
import sys

sys.dont_write_bytecode = True      # the source tree may be read-only

import images                       # noqa: E402
import report                       # noqa: E402
import tools                        # noqa: E402
from cases import CASES             # noqa: E402
from servers import CONTENDERS, serve  # noqa: E402


def say(text):
    print(text, file=sys.stderr, flush=True)


def size(text):
    """A number of bytes with an optional K, M, G or T."""
    shift = {"K": 10, "M": 20, "G": 30, "T": 40}.get(text[-1:].upper())
    number = int(text[:-1]) << shift if shift else int(text)
    if number < 1 << 20 or number % (1 << 20):
        raise argparse.ArgumentTypeError("must be a multiple of 1M")
    return number


def words(known):
    """A comma-separated choice from KNOWN."""
    def parse(text):
        chosen = text.split(",")
        for word in chosen:
            if word not in known:
                raise argparse.ArgumentTypeError(
                    f"{word}: not one of {', '.join(known)}")
        return chosen
    return parse


def options():
    names = [case.name for case in CASES]
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-n", dest="repetitions", type=int, default=5,
                        help="repetitions of everything (default 5)")
    parser.add_argument("--size", type=size, default=1 << 30,
                        help="bytes of data in the images (default 1G)")
    parser.add_argument("--seconds", type=float, default=4,
                        help="length of a run of fio (default 4)")
    parser.add_argument("--only", type=words(names), default=names,
                        metavar="CASE,...",
                        help="of these: " + ", ".join(names))
    parser.add_argument("--contenders", type=words(list(CONTENDERS)),
                        default=list(CONTENDERS), metavar="NAME,...",
                        help="of these: " + ", ".join(CONTENDERS))
    parser.add_argument("--images", metavar="DIR",
                        help="make the images there and keep them for the "
                        "next run (otherwise: /dev/shm or TMPDIR, removed)")
    parser.add_argument("--json", metavar="FILE",
                        help="also write every sample to FILE")
    parser.add_argument("--no-verify", action="store_true",
                        help="don't compare what is served with the disk")
    parser.add_argument("--strict", action="store_true",
                        help="exit with status 1 if a target was missed")
    return parser.parse_args()


class Bench:
    """One run: its options, its images and what it found out."""

    def __init__(self, opts, library):
        self.opts = opts
        self.library = library
        self.notes = []
        self.verified = set()
        self.bystanders = tools.Bystanders()
        self.contenders = self.available()

    def available(self):
        """The chosen contenders that this machine has."""
        found = []
        for name in self.opts.contenders:
            try:
                CONTENDERS[name].need()
                found.append(name)
            except tools.Unavailable as e:
                self.notes.append(f"{name} was left out: {e}")
        return found

    def takes_part(self, name, case):
        return (name in case.contenders
                and (CONTENDERS[name].extents
                     or not case.workload.needs_extents))

    def program(self, name, case):
        """What runs in a case without clients."""
        return case.workload.programs[name](self.library.path(case.image))

    def sample(self, argv_for, case):
        """One measurement with a fresh server: figure, CPU and memory."""
        with serve(argv_for, self.library, case) as server:
            cpu = server.cpu_seconds()
            figure = case.workload.run(server, self.opts)
            return (figure, server.cpu_seconds() - cpu,
                    server.peak_memory())

    def verify(self, name, argv_for, case):
        """Once for each contender, image and kind of check."""
        key = (name, case.image, case.workload.check)
        if self.opts.no_verify or key in self.verified or case.writable:
            return
        raw = self.library.path(images.IMAGES[case.image].raw)
        with serve(argv_for, self.library, case) as server:
            try:
                case.workload.check(server, raw)
            except RuntimeError as e:
                raise RuntimeError(f"{case.name}: {name} {e}") from e
        self.verified.add(key)

    def best_variant(self, name, case):
        """Try each variant of a contender once: the name of the best."""
        variants = CONTENDERS[name].variants
        if len(variants) == 1:
            return next(iter(variants))
        figures = {}
        for variant, argv_for in variants.items():
            try:
                figures[variant] = self.sample(argv_for, case)[0]
            except RuntimeError as e:
                self.notes.append(f"{name} {variant} does not work: {e}")
        if not figures:
            raise RuntimeError(f"{case.name}: {name} does not work")
        choose = min if case.workload.unit.lower_is_better else max
        return choose(figures, key=figures.get)

    def measure(self, case):
        """All repetitions of one case: {contender: Result}."""
        images.read_into_page_cache(self.library.path(case.image))
        names = [name for name in self.contenders
                 if self.takes_part(name, case)]
        if case.workload.programs:
            results = {name: report.Result() for name in names}
            samples = {name: functools.partial(tools.measure,
                                               self.program(name, case))
                       for name in names}
        else:
            results = {name: report.Result(self.best_variant(name, case))
                       for name in names}
            samples = {name: self.verified_sampler(name, result, case)
                       for name, result in results.items()}
        self.repeat(case, results, samples)
        return results

    def verified_sampler(self, name, result, case):
        argv_for = CONTENDERS[name].variants[result.variant]
        self.verify(name, argv_for, case)
        return functools.partial(self.sample, argv_for, case)

    def repeat(self, case, results, samples):
        """Take all samples of a case, the contenders in turn."""
        order = list(results)
        for repetition in range(self.opts.repetitions):
            for name in order:
                figure, cpu, peak = samples[name]()
                say(f"{case.name} {repetition + 1}/{self.opts.repetitions} "
                    f"{name}: {case.workload.unit.show(figure)}")
                results[name].figures.append(figure)
                results[name].cpu.append(cpu)
                results[name].peak.append(peak)
            order.append(order.pop(0))

    def measure_all(self):
        measured = []
        for case in CASES:
            if case.name not in self.opts.only:
                continue
            try:
                measured.append((case, self.measure(case)))
            except tools.Unavailable as e:
                self.notes.append(f"{case.name} was left out: {e}")
        return measured

    def heading(self):
        """What was measured, with what and where."""
        where = self.library.directory
        yield tools.machine()
        yield from tools.versions()
        yield (f"{self.library.size >> 20} MiB of the files in {images.ROOT}, "
               f"images in {where} ({tools.filesystem(where)}), "
               f"{self.opts.repetitions} repetitions")
        yield ("other programs meanwhile used "
               f"{self.bystanders.share():.1%} of the CPUs' time")

    def explanations(self, measured):
        """What the table's words stand for."""
        yield "cases:"
        for case, _ in measured:
            yield f"  {case.name}: {case.title}{self.compression(case)}"
        yield "contenders, as run for the first case:"
        for name, result in measured[0][1].items() if measured else ():
            yield f"  {name}: {self.command(name, result, measured[0][0])}"
        yield from self.notes

    def command(self, name, result, case):
        if case.workload.programs:
            return shlex.join(self.program(name, case))
        return shlex.join(CONTENDERS[name].variants[result.variant](
            self.library, case, "SOCKET", "PIDFILE"))

    def compression(self, case):
        if case.image not in images.COMPRESSED:
            return ""
        share = self.library.compression(case.image)
        return f" ({share:.0%} of the disk's size)"


@contextlib.contextmanager
def library(opts):
    """The images, in a directory that is removed unless it was named."""
    if opts.images:
        os.makedirs(opts.images, exist_ok=True)
        yield images.Library(os.path.abspath(opts.images), opts.size, say)
        return
    chosen = [case.image for case in CASES if case.name in opts.only]
    directory = images.choose_directory(
        images.Library.space(chosen) * opts.size)
    try:
        yield images.Library(directory, opts.size, say)
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def main():
    opts = options()
    with library(opts) as shelf:
        bench = Bench(opts, shelf)
        measured = bench.measure_all()
        lines = [*bench.heading(), "", *report.table(measured), "",
                 *bench.explanations(measured)]
    print("\n".join(lines))
    if opts.json:
        with open(opts.json, "w", encoding="utf-8") as f:
            json.dump(report.as_data(measured), f, indent=1)
    missed = report.missed(measured)
    if missed:
        print(f"\ntargets missed in: {', '.join(missed)}")
    return 1 if missed and opts.strict else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (RuntimeError, tools.Unavailable) as e:
        sys.exit(f"bench.py: {e}")
    except KeyboardInterrupt:
        sys.exit("bench.py: interrupted")
