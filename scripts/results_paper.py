"""What a mixture costs on paper, for docs/performance.md: counts of `moesaic.bench.paper`, over rates of devices."""

from __future__ import annotations

from pages import table

from moesaic.bench.paper import BASES, Base

R, K = 16, 2
EXPERTS = (8, 64, 256, 1000)
DEVICE, BANDWIDTH = "H200", 4.8e12
"""Bytes a second, as NVIDIA states them."""

_ABOUT = f"""## On paper

Counts for bases of Llama 3's shapes, all seven linears, r = {R}, top-{K}, bf16 (`moesaic.bench.paper`; a test holds
them against what torch counts). In training the mixture's arithmetic is paid three times, the frozen base's twice. A
step of decoding at batch 1 reads every weight that it multiplies by, so that its floor is bytes over bandwidth."""

_IMPLIED = """What that implies:

- **Training.** Rank space does E/k times the arithmetic that is needed, and is still the faster way while that is a
  few percent of the base's: at E = 8 it adds {small} to an 8B forward. At E = 64 it would add {middle}: sorted
  products over routed pairs (`grouped`) take over, from where on `moesaic bench suites=crossover` measures.
- **A router** costs {router} of what 8 experts cost, and reads the input in the same product as A.
- **Decoding.** To read all of 8 experts is {read} of the base's bytes, of 256 experts {much}. So past
  the crossover the k that a token is routed to are read alone; T rows read min(E, T k) experts.
- **Eager decoding is bound by launches, not by bytes**: eight launches a linear are {launches:,} a step of the 8B
  base, at five microseconds each {slow:.0f} ms, beside {floor:.1f} ms for reading the base. That is why linears that
  read one input decode together, and why a step wants one graph.
- **Many adapters.** A thousand of r = {r} are {bytes:.0f} GB in bf16 for an 8B base and {more:.0f} GB for a 70B one.
  On disk they cost nothing; on a device they are a second model, and serving pages those that a batch asks for.
- **vLLM** applies one plain adapter a request. Mixtures whose weights do not depend on the token (`uniform`, `cat`,
  `lorahub`) are one LoRA of rank E*r there (`moesaic export`); those that route by the prompt can be served by name,
  an adapter a request; those that route by token need a layer that vLLM does not have."""


def section() -> str:
    lines = [_ABOUT, ""]
    for base in BASES:
        rows = [_row(base, experts) for experts in EXPERTS]
        floor = 2e3 * base.read() / BANDWIDTH
        header = [
            f"{base.name}: experts", "weights, millions", "forward, all experts", f"forward, {K} experts",
            "bytes of a step, all", f"bytes of a step, {K}",
            f"floor on an {DEVICE}, ms a token (base {floor:.2f})",
        ]  # fmt: skip
        lines += [*table(header, rows), ""]
    small, large = BASES
    launches = small.layers * 7 * 8
    lines.append(
        _IMPLIED.format(
            small=_percent(small.mixture(8, R) / small.weights), middle=_percent(small.mixture(64, R) / small.weights),
            router=_percent(small.routers(8) / small.lora(8 * R)),
            read=_percent(small.mixture(8, R) / small.read()), much=_percent(small.mixture(256, R) / small.read()),
            launches=launches, slow=launches * 5e-3, floor=2e3 * small.read() / BANDWIDTH, r=R,
            bytes=2e-9 * small.lora(1000 * R), more=2e-9 * large.lora(1000 * R),
        )
    )  # fmt: skip
    return "\n".join(lines)


def _row(base: Base, experts: int) -> list[str]:
    every, active = base.mixture(experts, R), base.mixture(experts, R, K)
    return [
        str(experts), f"{every / 1e6:,.0f}",
        f"+{_percent(every / base.weights)}", f"+{_percent(active / base.weights)}",
        f"+{_percent(every / base.read())}", f"+{_percent(active / base.read())}",
        f"{2e3 * (base.read() + every) / BANDWIDTH:.2f}, {2e3 * (base.read() + active) / BANDWIDTH:.2f}",
    ]  # fmt: skip


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
