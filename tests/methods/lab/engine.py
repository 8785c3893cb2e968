"""This machine, and a line of each start in a file beside the checkpoints."""

from tuner.engines import LocalEngine


class Announced(LocalEngine):
    def start(self, job):
        job.directory.mkdir(parents=True, exist_ok=True)
        with (job.directory / "starts.log").open("a") as log:
            log.write(f"{job.spec.round}\n")
        return super().start(job)
