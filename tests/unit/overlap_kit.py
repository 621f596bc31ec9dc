"""Lanes of serial steps as a recorder would write them, from given times; and times of blocks by FLOPs and bytes."""

from collections.abc import Sequence

from moetrain.model.schedule import Schedule
from moetrain.parallel.block_times import FROM_EXPERTS, TO_EXPERTS, Site
from moetrain.parallel.overlap import EXPERTS, MAIN, TO, Act, OperatorTimes, PassTimes, Program, TripTimes, backward_of, program
from moetrain.telemetry.lanes import GRADIENT, Computation, Journey, Lanes


def shaped(
    tokens: int, hidden: int, ffn: int, top_k: int, num_operators: int, megabit: float, skew: float = 1.0, flops: float = 50e9
) -> OperatorTimes:
    """Seconds of a block pair: attention and MLP beside k routed experts, on two ranks."""
    mlp, attention = 6 * tokens * hidden * ffn / flops, (8 * tokens * hidden**2 + 2 * tokens**2 * hidden) / flops
    main = (attention, mlp, attention, mlp)[4 - num_operators :]
    experts, exchange = top_k * skew * mlp, skew * top_k * tokens * hidden * 4 / 2 * 8 / (megabit * 1e6)
    forward = PassTimes(main, (TripTimes(experts, exchange, exchange),))
    backward = PassTimes(tuple(2 * s for s in main), (TripTimes(2 * experts, exchange, exchange),))
    return OperatorTimes(forward, backward)


def serial_lanes(sites: Sequence[Site], schedules: Sequence[Schedule], times: Sequence[OperatorTimes], num_batches: int = 1) -> Lanes:
    """Every micro-batch forward through all blocks and back; `times` has one entry per visit, in the order of the forward passes."""
    player = _Player()
    for batch in range(num_batches):
        visits = list(zip(sites, schedules, times[batch * len(sites) : (batch + 1) * len(sites)], strict=True))
        for site, schedule, its in visits:
            player.play(program(len(site.operators), schedule, site.num_trips), site, its.forward, "")
        for site, schedule, its in reversed(visits):
            player.play(backward_of(program(len(site.operators), schedule, site.num_trips)), site, its.backward, GRADIENT)
    return Lanes(True, player.computations, player.journeys)


class _Player:
    def __init__(self) -> None:
        self.now = 0.0
        self.computations: list[Computation] = []
        self.journeys: list[Journey] = []

    def play(self, acts: Program, site: Site, times: PassTimes, prefix: str) -> None:
        pieces = [trip.chunk(site.num_chunks) for trip in times.trips]
        flying: dict[tuple[int, int, int], int] = {}
        for act, (what, trip, number) in acts:
            if act is Act.WAIT:
                at = flying[what, trip, number]
                old = self.journeys[at]
                self.journeys[at] = Journey(old.name, old.num_bytes, old.ready, old.start, old.end, self.now, self.now)
            elif act is Act.LAUNCH:
                name = prefix + (TO_EXPERTS if what == TO else FROM_EXPERTS)
                flying[what, trip, number] = len(self.journeys)
                start, self.now = self.now, self.now + pieces[trip][what]
                self.journeys.append(Journey(name, 1000, start, start, self.now, self.now, self.now))
            else:
                operator = site.operators[number] if what == MAIN else "experts"
                start, self.now = self.now, self.now + (times.main[number] if what == MAIN else pieces[trip][EXPERTS])
                self.computations.append(Computation(f"{prefix}{site.name}/{operator}", start, self.now))
