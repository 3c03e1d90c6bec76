"""The README's tables: `python tests/bench_peers.py > tables.md`.

Every instruction set of this machine and every installed peer, in one process, by the methods of `bn-c bench`.
"""

from dataclasses import replace
from functools import partial

import bn_c
from bn_c import _dispatch, bench
from bn_c.bench import ALLOC, COPY, EPS, FOLDED, OUT, PEERS, PLAIN, Case, Contender

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
    Case("103 MB", NCHW, batch=True),
    Case("103 MB", NHWC, -1, batch=True),
    Case("6 MB", (8, 64, 56, 56), batch=True),
    Case("6 MB", (8, 56, 56, 64), -1, batch=True),
    Case("6 MB", (32, 256, 14, 14), batch=True),
    Case("1 MB", (256, 1024), batch=True),
    Case("2 MB", (100_000, 4), batch=True),
    Case("51 MB", NCHW, dtype="float16", batch=True),
    Case("51 MB", NHWC, -1, dtype="float16", batch=True),
    Case("6 MB", (8, 64, 56, 56), batch=True, fused=True),
)

# An awkward layout, and the friendly one of as many elements.
_PLAIN = Case("contiguous", (8, 64, 56, 56))
LAYOUTS = tuple(
    (replace(awkward, batch=batch), replace(friendly, batch=batch))
    for batch in (False, True)
    for awkward, friendly in (
        *((Case("channels last", (8, 224, 224, c), -1), Case("channels first", (8, c, 224, 224))) for c in (1, 3, 4)),
        (Case("planes of 7 x 7", (32, 512, 7, 7)), Case("of 28 x 28", (32, 32, 28, 28))),
        (Case("planes of 13 x 13", (32, 256, 13, 13)), Case("of 52 x 52", (32, 16, 52, 52))),
        (replace(_PLAIN, name="x[..., ::2]", memory="strided"), _PLAIN),
        (replace(_PLAIN, name="Fortran order", memory="F"), _PLAIN),
    )
)

TALL = Case("mean 1013, std 1", (1_000_000, 4), offset=1013.0)


def own(case, arrays):
    """bn_c on each instruction set: the best under its usual names, the others with theirs added."""
    for isa in ISAS:
        for c in bench.ours(case, arrays, 1):
            name = c.name if isa == BEST else f"{c.name} {isa}"
            yield replace(c, name=name, before=partial(_dispatch.use, isa))


def results(case):
    arrays = bench.arrays(case)
    mine = {OUT, ALLOC}
    peers = [c for c in bench.contenders(case, arrays, 1) if c.name not in mine]
    return bench.measure(case, arrays, [*own(case, arrays), *peers], SECONDS)


def of_isa(found, isa):
    return found[OUT if isa == BEST else f"{OUT} {isa}"]


def table(header, rows):
    print("| " + " | ".join(header) + " |")
    print("|---" * len(header) + "|")
    for cells in rows:
        print("| " + " | ".join(cells) + " |", flush=True)
    print()


def versus(found, peer):
    value = bench.ratio(found, peer)
    if value is None:
        return "-"
    return f"**{bench.digits(value)}**" if value < 1 else bench.digits(value)


def faster(found):
    return ", ".join(peer for peer in PEERS if (bench.ratio(found, peer) or 1) < 1)


def speed_row(case):
    found = results(case)
    copy = found[COPY].seconds
    errors = [found[peer].error for peer in PEERS if peer in found]
    return (
        case.label,
        bench.duration(found[OUT].seconds),
        ", ".join(bench.digits(of_isa(found, isa).seconds / copy) for isa in ISAS),
        bench.digits(found[ALLOC].seconds / copy),
        *(versus(found, peer) for peer in PEERS),
        bench.digits(found[OUT].error),
        f"{bench.digits(min(errors))} .. {bench.digits(max(errors))}",
        faster(found),
    )


def speed():
    header = (
        "time of bn_c",
        f"copy ({', '.join(ISAS)})",
        "alloc",
        *PEERS,
        "error",
        "error of others",
        "faster than bn_c",
    )
    for group in dict.fromkeys(case.group for case in SPEED):
        table((group, *header), (speed_row(case) for case in SPEED if case.group == group))


def layout_row(awkward, friendly, friendly_results):
    found = results(awkward)
    return (
        awkward.label,
        friendly.label,
        bench.duration(found[OUT].seconds),
        ", ".join(bench.digits(of_isa(found, isa).seconds / of_isa(friendly_results, isa).seconds) for isa in ISAS),
        *(versus(found, peer) for peer in PEERS),
        faster(found),
    )


def layouts():
    known = {}
    for batch in (False, True):
        rows = (
            layout_row(awkward, friendly, known.get(friendly) or known.setdefault(friendly, results(friendly)))
            for awkward, friendly in LAYOUTS
            if awkward.batch == batch
        )
        header = (f"layout, {'batch statistics' if batch else 'inference'}", "friendly", "time of bn_c")
        table((*header, f"/ friendly ({', '.join(ISAS)})", *PEERS, "faster than bn_c"), rows)


def calls():
    case = Case("one call", (1, 64))
    a = bench.arrays(case)
    given = partial(bn_c.batch_norm_inference, a.x, a.mean, a.var, a.gamma, a.beta, eps=EPS)
    names = {OUT: "layer(x, out=y)", ALLOC: "layer(x)", FOLDED: "np.multiply, np.add with out=", PLAIN: "definition"}
    mine = [replace(c, before=partial(_dispatch.use, BEST)) for c in bench.ours(case, a, 1)]
    extra = [Contender("batch_norm_inference(..., out=y)", partial(given, out=a.out))]
    peers = [c for c in bench.contenders(case, a, 1) if c.name not in {OUT, ALLOC}]
    found = bench.measure(case, a, [*mine, *extra, *peers], SECONDS)
    table(
        (case.label, "time", "/ layer(x, out=y)"),
        (
            (names.get(name, name), bench.duration(r.seconds), bench.digits(r.seconds / found[OUT].seconds))
            for name, r in found.items()
        ),
    )


def accuracy():
    for case in (replace(TALL, batch=True), TALL):
        found = results(case)
        table(
            (f"{case.group}, {case.label}", "largest abs(y - exact)", "error", "time"),
            (
                (name, f"{r.deviation:.1e}", bench.digits(r.error), bench.duration(r.seconds))
                for name, r in found.items()
                if name in {OUT, *PEERS}
            ),
        )


def main():
    for name, text in bench.machine(1).items():
        print(f"- {name}: {text}")
    print("\n```\n" + bench.LEGEND + "\n```\n")
    speed()
    calls()
    layouts()
    accuracy()


if __name__ == "__main__":
    main()
