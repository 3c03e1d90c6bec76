"""The README's tables: `python tests/bench_peers.py > tables.md`.

Every instruction set of this machine and every installed peer, in one process, by the methods of `bn-c bench`.
"""

from dataclasses import replace
from functools import partial
from itertools import groupby

import numpy as np

import bn_c
from bn_c import _dispatch, bench
from bn_c.bench import ALLOC, EPS, OUT, PEERS, Case, Way
from bn_c.commands.bench import LEGEND, digits, duration, machine

SECONDS = 6.0
ISAS = bn_c.supported_isas()
BEST = ISAS[-1]

NCHW, NHWC = (32, 64, 112, 112), (32, 112, 112, 64)
SPEED = (
    Case("103 MB", NCHW),
    Case("103 MB", NHWC, -1),
    Case("in cache", (1, 64, 56, 56)),
    Case("in cache", (1, 56, 56, 64), -1),
    Case("in cache", (256, 1024)),
    Case("51 MB", NCHW, dtype="float16"),
    Case("51 MB", NHWC, -1, dtype="float16"),
    Case("in cache", (8, 64, 56, 56), fused=True),
    Case("103 MB", NCHW, fused=True),
    Case("51 MB", NCHW, dtype="float16", fused=True),
    Case("103 MB", NCHW, batch=True),
    Case("103 MB", NHWC, -1, batch=True),
    Case("6 MB", (8, 64, 56, 56), batch=True),
    Case("6 MB", (8, 56, 56, 64), -1, batch=True),
    Case("6 MB", (32, 256, 14, 14), batch=True),
    Case("1 MB", (256, 1024), batch=True),
    Case("2 MB", (100_000, 4), batch=True),
    Case("one image", (1, 512, 7, 7), batch=True),
    Case("one image", (1, 28, 28, 128), -1, batch=True),
    Case("51 MB", NCHW, dtype="float16", batch=True),
    Case("51 MB", NHWC, -1, dtype="float16", batch=True),
    Case("6 MB", (8, 64, 56, 56), batch=True, fused=True),
    Case("ImageNet", (1, 3, 224, 224), dtype="uint8"),
    Case("1080p", (1, 3, 1080, 1920), dtype="uint8"),
)


def placed(place):
    """Another x in memory, and an out as NumPy makes one for it."""
    return lambda a: replace(a, x=place(a.x), out=np.zeros_like(place(a.x)))


def far(a):
    return replace(a, x=a.x + 1013, mean=a.mean + 1013)


PLAIN = Case("contiguous", (8, 64, 56, 56))
# Awkward layouts, and the friendly ones of as many elements.
LAYOUTS = (
    *((Case("channels last", (8, 224, 224, c), -1), None, Case("first", (8, c, 224, 224))) for c in (1, 3, 4)),
    (Case("planes", (32, 512, 7, 7)), None, Case("planes", (32, 32, 28, 28))),
    (Case("planes", (32, 256, 13, 13)), None, Case("planes", (32, 16, 52, 52))),
    (Case("planes", (32, 512, 7, 7), dtype="float16"), None, Case("planes", (32, 32, 28, 28), dtype="float16")),
    (replace(PLAIN, name="x[..., ::2]"), placed(lambda x: np.repeat(x, 2, -1)[..., ::2]), PLAIN),
    (replace(PLAIN, name="Fortran order"), placed(np.asfortranarray), PLAIN),
)
FAR = Case("mean 1013", (1_000_000, 4))


def named(name, isa):
    return name if isa == BEST else f"{name} {isa}"


def measured(case, change=None):
    """bn_c on each instruction set, the best under its usual names, and the peers."""
    a = bench.arrays(case)
    if change:
        a = change(a)
    own = {
        named(name, isa): replace(way, before=partial(_dispatch.use, isa))
        for isa in ISAS
        for name, way in bench.ours(case, a, 1).items()
    }
    return bench.measure(case, a, {**own, **bench.others(case, a, 1)}, SECONDS)


def table(header, rows):
    print("| " + " | ".join(header) + " |")
    print("|---" * len(header) + "|")
    for cells in rows:
        print("| " + " | ".join(cells) + " |", flush=True)
    print()


def ratios(found):
    """Of the peers; bold where bn_c loses."""
    for value in map(found.ratio, PEERS):
        yield "-" if value is None else f"**{digits(value)}**" if value < 1 else digits(value)


def on_each(found, other):
    """bn_c's times on each instruction set over those others."""
    return ", ".join(digits(found.results[named(OUT, isa)].seconds / other(isa)) for isa in ISAS)


COLUMNS = [peer.name for peer in PEERS]
SETS = ", ".join(ISAS)


def speed_row(case):
    found = measured(case)
    errors = [found.results[peer.name].error for peer in found.peers]
    return (
        case.label,
        duration(found.results[OUT].seconds),
        on_each(found, lambda _: found.copy),
        digits(found.results[ALLOC].seconds / found.copy),
        *ratios(found),
        digits(found.results[OUT].error),
        f"{digits(min(errors))} .. {digits(max(errors))}",
    )


def speed():
    header = ("time of bn_c", f"x copy: {SETS}", "allocating", *COLUMNS, "error", "error of others")
    for group, cases in groupby(SPEED, lambda case: case.group):
        table((group, *header), map(speed_row, cases))


def layout_row(batch, awkward, change, friendly):
    found, usual = measured(replace(awkward, batch=batch), change), measured(replace(friendly, batch=batch))
    slower = on_each(found, lambda isa: usual.results[named(OUT, isa)].seconds)
    return awkward.label, friendly.label, duration(found.results[OUT].seconds), slower, *ratios(found)


def layouts():
    for batch in (False, True):
        work = replace(PLAIN, batch=batch).group
        header = (f"layouts, {work}", "friendly", "time of bn_c", f"/ friendly: {SETS}", *COLUMNS)
        table(header, (layout_row(batch, *layout) for layout in LAYOUTS))


def calls():
    case = Case("one call", (1, 64))
    a = bench.arrays(case)
    function = partial(bn_c.batch_norm_inference, a.x, a.mean, a.var, a.gamma, a.beta, eps=EPS, out=a.out)
    ways = {**bench.ours(case, a, 1), "batch_norm_inference(..., out=y)": Way(function), **bench.others(case, a, 1)}
    _dispatch.use(BEST)
    found = bench.measure(case, a, ways, SECONDS).results
    rows = ((name, duration(r.seconds), digits(r.seconds / found[OUT].seconds)) for name, r in found.items())
    table((case.label, "time", "/ bn_c's layer(x, out=y)"), rows)


def accuracy():
    for case in (replace(FAR, batch=True), FAR):
        found = measured(case, far).results
        rows = (
            (name, digits(found[name].error), duration(found[name].seconds))
            for name in (OUT, *COLUMNS)
            if name in found
        )
        table((f"{case.group}, {case.label}", "error", "time"), rows)


def main():
    for name, text in machine(1).items():
        print(f"- {name}: {text}")
    print(f"\n```\n{LEGEND}\n```\n")
    speed()
    calls()
    layouts()
    accuracy()


if __name__ == "__main__":
    main()
