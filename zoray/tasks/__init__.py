"""Where examples come from: your own files, published data sets, and problems that are made up.

A task is a frozen dataclass whose `load()` gives the same Splits on every machine. Imports records, methods (for
draws) and models (for tokens in a preview). The driver loads the task to check a run, and each replica loads its own.
"""

from zoray import faces

__getattr__ = faces(
    __name__,
    {
        "File": "file.task",
        "Mixture": "mixture",
        "Part": "mixture",
        "FewShot": "few_shot",
        "BoolQ": "published.boolq",
        "CB": "published.cb",
        "COPA": "published.copa",
        "DROP": "published.drop",
        "GSM8K": "published.gsm8k",
        "MovieReviews": "published.movie_reviews",
        "MultiRC": "published.multirc",
        "ReCoRD": "published.record",
        "RTE": "published.rte",
        "SQuAD": "published.squad",
        "SST2": "published.sst2",
        "WiC": "published.wic",
        "WSC": "published.wsc",
        "Countdown": "made_up.countdown",
        "Questions": "made_up.questions",
        "Structured": "made_up.structured",
    },
)
