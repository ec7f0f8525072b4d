"""Claims that need no training, for the tests of everything that stands around the claims."""

from types import SimpleNamespace

from batchnorm.lab.claim import Card, Verdict
from batchnorm.lab.config import Job, Network, Run, Training
from batchnorm.lab.data import load
from batchnorm.lab.measures import find, measure_over_seeds
from batchnorm.lab.record import make_record
from batchnorm.reporting.figures import panel

HOSTILE = "<b>tags</b> & 'quotes' {{ braces }}"


def make_claim(name="toy", *, verdict="shown", text=HOSTILE, value=lambda seed: float(seed), before_run=None):
    """A claim whose records hold `value(seed)`; its one job runs in this process."""

    def jobs(seeds, tier):
        training = Training(data="wine", steps=0, evaluations=(0,))
        return [Job(name, tuple(Run(name, "only", seed, 0.1, Network(depth=0), training) for seed in seeds))]

    def run(job):
        if before_run is not None:
            before_run()
        sha256 = load("wine").sha256
        return [
            make_record(one, curves={"step": [0]}, values={"value": value(one.seed)}, seconds=0.5, data_sha256=sha256)
            for one in job.runs
        ]

    def measure(records):
        return [measure_over_seeds("value", "the value", "%", [float(one["values"]["value"]) for one in records])]

    def judge(measures):
        return Verdict(verdict, find(measures, "value"), text)

    def figure(records, measures):
        drawing, axes = panel("A panel", "seed", "value")
        axes.plot([one["values"]["value"] for one in records])
        return {"one": (drawing, text)}

    card = Card(name, f"{name} title", text, text, text, text, text, text)
    return SimpleNamespace(CARD=card, jobs=jobs, run=run, measure=measure, judge=judge, figure=figure)
