"""Proof of tick tables: a replay that looks only at the numbers that the pipeline's loop reads."""

import collections

from sharding.ticks import FIELDS, TickTable


def check(table: TickTable):
    """Replay a table.

    Raises:
        ValueError: a micro-batch that does not pass every stage once both ways, or a buffer entry
            that is read before it is written, or written while it is in use. Tick and rank are
            named.
    """
    replay = Replay(table)
    for tick, ranks in enumerate(table.rows.tolist()):
        rows = [dict(zip(FIELDS, row, strict=True)) for row in ranks]
        sent = [replay.work((tick, rank), row) for rank, row in enumerate(rows)]
        for rank, row in enumerate(rows):
            replay.arrive((tick, rank), row, sent)
    replay.check_complete(table.schedule.n_micro)


class Replay:
    """The content of every rank's buffers: (stage, chunk, micro-batch) per entry, or None."""

    def __init__(self, table: TickTable):
        self.stages, self.name = table.stages, table.schedule.name
        sizes = {"x": table.n_x, "g": table.n_g}
        sizes |= {"residuals": table.n_residuals, "operands": table.n_operands}
        self.buffers = [
            {kind: [None] * n for kind, n in sizes.items()} for _ in range(self.stages.n_ranks)
        ]
        self.done: collections.Counter = collections.Counter()  # of (phase, stage, micro-batch)

    def expect(self, at: tuple, right, message):
        if not right:
            tick, rank = at
            raise ValueError(f"{self.name}, tick {tick}, rank {rank}: {message}")

    def take(self, at: tuple, kind, entry, wanted):
        buffer = self.buffers[at[1]][kind]
        found = buffer[entry] if 0 <= entry < len(buffer) else None
        self.expect(at, found == wanted, f"entry {entry} of {kind} holds {found}, not {wanted}")
        buffer[entry] = None

    def put(self, at: tuple, kind, entry, content):
        buffer = self.buffers[at[1]][kind]
        free = 0 <= entry < len(buffer) and buffer[entry] is None
        self.expect(at, free, f"entry {entry} of {kind} is not free for {content}")
        buffer[entry] = content

    def work(self, at: tuple, row: dict):
        """Do what a row says; return what the rank has to send after the tick."""
        sent = dict.fromkeys(("x", "g", "end"))
        if row["f_on"]:
            self.forward(at, row, sent)
        if row["b_on"]:
            self.backward(at, row, sent)
        if row["w_on"]:
            stage = self.stages.stage(at[1], row["w_chunk"])
            self.take(at, "operands", row["w_operands"], (stage, row["w_chunk"]))
            self.done["W", stage] += 1
        return sent

    def forward(self, at: tuple, row: dict, sent: dict):
        chunk, micro = row["f_chunk"], row["f_micro"]
        stage = self.stages.stage(at[1], chunk)
        self.expect(at, row["f_first"] == (stage == 0), f"stage {stage}, f_first={row['f_first']}")
        if stage:
            self.take(at, "x", row["f_in"], (stage, chunk, micro))
        self.put(at, "residuals", row["f_residuals"], (stage, chunk, micro))
        last = stage == self.stages.n_stages - 1
        sent["end" if last else "x"] = (stage if last else stage + 1, chunk, micro)
        self.done["F", stage, micro] += 1

    def backward(self, at: tuple, row: dict, sent: dict):
        chunk, micro = row["b_chunk"], row["b_micro"]
        stage = self.stages.stage(at[1], chunk)
        ends = (row["b_first"], row["b_last"])
        right = (stage == 0, stage == self.stages.n_stages - 1)
        self.expect(at, ends == right, f"stage {stage} has b_first, b_last = {ends}")
        self.take(at, "g", row["b_in"], (stage, chunk, micro))
        self.take(at, "residuals", row["b_residuals"], (stage, chunk, micro))
        sent["g"] = (stage - 1, chunk, micro) if stage else None
        self.done["B", stage, micro] += 1
        if row["b_defers"]:
            self.put(at, "operands", row["b_operands"], (stage, chunk))
        else:
            self.done["W", stage] += 1

    def arrive(self, at: tuple, row: dict, sent: list):
        """Put what the rank, and those before and after it, have sent where the row says."""
        rank = at[1]
        sources = {"down": rank - 1, "up": rank + 1, "self": rank}
        for kind in ("x", "g"):
            for direction, source in sources.items():
                message = sent[source][kind] if 0 <= source < len(sent) else None
                wanted = message is not None and self.is_for(rank, message)
                entry = row[f"{kind}_{direction}"]
                arrives = message or "nothing"
                self.expect(
                    at, (entry >= 0) == wanted, f"{kind}_{direction}={entry}; {arrives} arrives"
                )
                if wanted:
                    self.put(at, kind, entry, self.as_received(message))
        end = sent[rank]["end"]
        self.expect(at, (row["g_end"] >= 0) == (end is not None), f"g_end={row['g_end']}")
        if end is not None:
            self.put(at, "g", row["g_end"], end)

    def is_for(self, rank: int, message: tuple) -> bool:
        """Whether a rank holds the stage that a neighbour's message (stage, chunk, ...) is for."""
        return any(
            self.stages.stage(rank, chunk) == message[0]
            and (self.stages.shape == "v" or chunk == message[1])
            for chunk in range(self.stages.n_chunks)
        )

    def as_received(self, message: tuple) -> tuple:
        """A message as its receiver names it: in a V the chunk changes at the turn."""
        stage, chunk, micro = message
        if self.stages.shape == "v":
            chunk = int(stage >= self.stages.n_ranks)
        return stage, chunk, micro

    def check_complete(self, n_micro: int):
        """Every micro-batch went through every stage both ways, once, and every W was done."""
        for stage in range(self.stages.n_stages):
            for phase in "FB":
                for micro in range(n_micro):
                    if (count := self.done[phase, stage, micro]) != 1:
                        raise ValueError(
                            f"{self.name}: {phase} of {micro} in stage {stage} runs {count} times"
                        )
            if (count := self.done["W", stage]) != n_micro:
                raise ValueError(f"{self.name}: W of stage {stage} ran {count} times")
