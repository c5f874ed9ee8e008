"""How the programs of a collective meet those of all other ranks: each program p with the programs p.

Every rank has flags i32 [2, PROGRAMS, WORLD], zero: flag [half, p, r] is set by program p of rank r, when it has come,
and cleared by this rank's program p, which waits for it. Ranks write to each other's memory and read their own alone,
and write by plain stores: so it works over any bus.

Why nothing is lost: meetings use the halves in turn. A rank sets a flag for meeting m + 2 after meeting m + 1, to which
the flag's owner came after the launch of meeting m had ended, and with it every program had cleared its flags of m.
So it is with what they exchange, in two buffers used in turn: who writes the buffer of collective c again has met, in
collective c + 1, ranks that had ended c. Between the last collective of a step and the first of the next one nobody
meets, so their number must be even, or the last one meet once more when it has read (compiler/lower/collectives.py).
"""

from __future__ import annotations

import triton
import triton.language as tl

# Longer than any step: then a rank will never come, and a fault that the host sees is better than waiting for ever.
LIMIT_NS = tl.constexpr(30_000_000_000)


@triton.jit
def _release():
    """What is visible to this program is visible to all who see a flag that its first thread sets after this."""
    tl.inline_asm_elementwise("fence.acq_rel.sys; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _set(flag):
    """Sets a flag of any rank once: a second store could come when it has been cleared."""
    tl.inline_asm_elementwise(
        """{
            .reg .pred is_first;
            .reg .b32 thread;
            mov.u32 thread, %tid.x;
            setp.eq.u32 is_first, thread, 0;
            @is_first st.relaxed.sys.global.b32 [$1], 1;
            mov.u32 $0, 0;
        }""",
        "=r,l",
        [flag],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def _now():
    """Nanoseconds."""
    return tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)


@triton.jit
def _await(flag):
    """Waits until another rank has set the flag, and clears it."""
    begin = _now()
    while tl.atomic_cas(flag, 1, 0, sem="acquire", scope="sys") == 0:
        if _now() - begin > LIMIT_NS:
            tl.inline_asm_elementwise("trap; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def meet(
    flags,  # i32 [2, PROGRAMS, WORLD] of this rank
    signals,  # i64 [WORLD]: the addresses of every rank's flags
    rank,
    half,  # 0 or 1, other than that of the meeting before
    PROGRAMS: tl.constexpr,
    WORLD: tl.constexpr,
    WAIT: tl.constexpr,  # False where ranks run one after the other
):
    """Returns when this program of every rank has come: then what they had written can be read."""
    if WAIT:
        place = (half * PROGRAMS + tl.program_id(0)) * WORLD
        tl.debug_barrier()  # what the other threads read, they have read
        _release()
        for peer in tl.static_range(WORLD):
            _set(tl.load(signals + peer) + (place + rank) * 4)
        for peer in tl.static_range(WORLD):
            _await(flags + place + peer)
        tl.debug_barrier()
