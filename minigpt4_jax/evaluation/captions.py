"""Scores of captions against what people wrote: candidates, references -> CIDEr-D, BLEU-4.

CIDEr-D as in coco-caption (Vedantam et al. 2015, section 5), with the document
frequencies of the scored set's own references; BLEU-4 of the whole set with the
closest reference length. Words are lower-case runs of letters and digits: no tokeniser of
another language is needed, and figures differ a little from papers that use one. On the
same words both scores equal those of pycocoevalcap 1.2 (540 photos, to 1e-9).

    python -m minigpt4_jax.evaluation.captions \
        --answers=answers.jsonl --references=references.jsonl

prints one JSON object. A line of answers has `image` and `answer`, a line of references
`image` and `captions`; answers with an `error` count as empty captions.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
from absl import flags

from minigpt4_jax import errors
from minigpt4_jax.errors import DataError, InputError

MAX_N = 4  # longest n-gram, in words
SIGMA = 6.0  # of the Gaussian length penalty, in words

Ngram = tuple[str, ...]
References = Sequence[Sequence[str]]


def words(caption: str) -> list[str]:
    return re.findall(r"[a-z0-9]+", caption.lower())


def cider_d(candidates: Sequence[str], references: References) -> float:
    """Mean CIDEr-D of a set, times 100 (papers print 0.86 or 86.0; here 86.0)."""
    return float(np.mean(cider_d_per_image(candidates, references)))


def cider_d_per_image(candidates: Sequence[str], references: References) -> list[float]:
    """CIDEr-D of each image, times 100: 0 to 1000.

    Args:
        candidates: one caption for each image; "" scores 0.
        references: people's captions of each image, at least one. They also give the
            document frequencies, so a score belongs to its set: in a set of one image
            every n-gram is in every document and all scores are 0.
    """
    _check(candidates, references)
    counts = [[_ngrams(words(text)) for text in texts] for texts in references]
    documents = Counter(
        ngram for texts in counts for ngram in set().union(*texts) if ngram
    )
    log_images = math.log(len(references))

    def weigh(ngrams: Counter[Ngram]) -> "_Weighted":
        return _Weighted(ngrams, documents, log_images)

    return [
        float(np.mean([weigh(_ngrams(words(text))).similarity(weigh(r)) for r in refs]))
        for text, refs in zip(candidates, counts, strict=True)
    ]


class _Weighted:
    """A caption as one tf-idf vector for each n, with its length in words."""

    def __init__(
        self, ngrams: Counter[Ngram], documents: Mapping[Ngram, int], log_images: float
    ):
        self.vectors: list[dict[Ngram, float]] = [{} for _ in range(MAX_N)]
        for ngram, count in ngrams.items():
            idf = log_images - math.log(max(documents.get(ngram, 0), 1))
            self.vectors[len(ngram) - 1][ngram] = count * idf
        self.norms = [math.hypot(*vector.values()) for vector in self.vectors]
        # coco-caption counts bigrams, which is words - 1 in all but the empty caption;
        # only differences are used.
        self.length = sum(count for ngram, count in ngrams.items() if len(ngram) == 2)

    def similarity(self, reference: "_Weighted") -> float:
        """Clipped cosine, mean over n, times the length penalty, times 10 x 100."""
        cosines = []
        for ours, theirs, a, b in zip(
            self.vectors, reference.vectors, self.norms, reference.norms, strict=True
        ):
            shared = sum(
                min(weight, theirs[ngram]) * theirs[ngram]
                for ngram, weight in ours.items()
                if ngram in theirs
            )
            cosines.append(shared / (a * b) if a and b else 0.0)
        penalty = math.exp(-((self.length - reference.length) ** 2) / (2 * SIGMA**2))
        return 1000.0 * penalty * float(np.mean(cosines))


def bleu4(candidates: Sequence[str], references: References) -> float:
    """BLEU-4 of a whole set, times 100: 0 to 100.

    Clipped n-gram precisions are pooled over the set; the brevity penalty compares with
    the reference of closest length (the shorter of two equally close). 0 if some n has
    no match at all.
    """
    _check(candidates, references)
    matched, total = np.zeros(MAX_N), np.zeros(MAX_N)
    length = closest = 0
    for text, texts in zip(candidates, references, strict=True):
        ours, theirs = words(text), [words(reference) for reference in texts]
        length += len(ours)
        closest += min((abs(len(r) - len(ours)), len(r)) for r in theirs)[1]
        allowed: Counter[Ngram] = Counter()
        for reference in theirs:
            allowed |= _ngrams(reference)
        for ngram, count in _ngrams(ours).items():
            total[len(ngram) - 1] += count
            matched[len(ngram) - 1] += min(count, allowed[ngram])
    if not matched.all():
        return 0.0
    brevity = min(1.0, math.exp(1 - closest / length))
    return 100.0 * brevity * float(np.exp(np.log(matched / total).mean()))


def exchanged(answers: Sequence[str]) -> list[str]:
    """Each answer given to the next image and the last to the first.

    Scores of exchanged answers show what a model says without looking: nobody keeps the
    own answer, and the answers as a set stay the same.
    """
    if len(answers) < 2:
        raise InputError(f"exchanging answers needs two images, got {len(answers)}")
    return [answers[-1], *answers[:-1]]


def human(references: References) -> tuple[list[str], list[list[str]]]:
    """(candidates, references): one caption of each image against its others.

    The images take turns in which caption they give, since lists of captions are often
    sorted and their first ones then alike. Images with one caption are left out.
    """
    several = [list(texts) for texts in references if len(texts) > 1]
    turns = [i % len(texts) for i, texts in enumerate(several)]
    return (
        [texts[k] for texts, k in zip(several, turns)],
        [texts[:k] + texts[k + 1 :] for texts, k in zip(several, turns)],
    )


def interval(
    per_image: Sequence[float],
    *,
    level: float = 0.95,
    draws: int = 2000,
    seed: int = 0,
    statistic: Callable[..., np.ndarray] = np.mean,
) -> tuple[float, float]:
    """Bootstrap interval over images of a mean (or another statistic with `axis`).

    Document frequencies stay those of the whole set.
    """
    values_B = np.asarray(per_image, float)
    rng = np.random.default_rng(seed)
    rows = rng.integers(len(values_B), size=(draws, len(values_B)))
    low, high = np.quantile(
        statistic(values_B[rows], axis=1), [(1 - level) / 2, (1 + level) / 2]
    )
    return float(low), float(high)


def report(candidates: Sequence[str], references: References) -> dict[str, object]:
    """All scores of a set, for a line of JSON; exchanged is None for a single image."""
    per_image = cider_d_per_image(candidates, references)
    several = len(candidates) > 1
    swapped = cider_d(exchanged(candidates), references) if several else None
    return {
        "n": len(candidates),
        "cider_d": round(float(np.mean(per_image)), 2),
        "cider_d_interval": [round(bound, 2) for bound in interval(per_image)],
        "cider_d_exchanged": swapped if swapped is None else round(swapped, 2),
        "bleu4": round(bleu4(candidates, references), 2),
    }


def read_pairs(
    answers: str | Path, references: str | Path
) -> tuple[list[str], list[list[str]]]:
    """(candidates, references) of two files, in the order of the references.

    Raises:
        DataError: a line lacks a key, an image is named twice, or the files do not name
            the same images.
    """
    ours = {
        name: "" if line.get("error") else _key(line, "answer", str, answers)
        for name, line in _lines(answers).items()
    }
    theirs = {
        name: [str(text) for text in _key(line, "captions", list, references)]
        for name, line in _lines(references).items()
    }
    absent, extra = sorted(theirs.keys() - ours), sorted(ours.keys() - theirs)
    if absent or extra:
        raise DataError(
            f"{answers} and {references} must name the same images: "
            f"{len(absent)} without answer {absent[:3]}, "
            f"{len(extra)} without captions {extra[:3]}"
        )
    return [ours[name] for name in theirs], list(theirs.values())


def _lines(path: str | Path) -> dict[str, dict]:
    lines: dict[str, dict] = {}
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read as text: {error}") from error
    for number, row in enumerate(text.split("\n"), start=1):
        if not row.strip():
            continue
        try:
            line = json.loads(row)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}:{number}: not JSON: {error}") from error
        if not isinstance(line, dict) or not isinstance(line.get("image"), str):
            raise DataError(f"{path}:{number}: want an object with a string `image`")
        if line["image"] in lines:
            raise DataError(f"{path}:{number}: {line['image']!r} was named before")
        lines[line["image"]] = line
    if not lines:
        raise DataError(f"{path}: no lines")
    return lines


def _key(line: dict, key: str, kind: type, path: str | Path):
    value = line.get(key)
    if not isinstance(value, kind):
        raise DataError(
            f"{path}: image {line['image']!r}: got {key}={value!r}, want a {kind.__name__}"
        )
    return value


def _ngrams(text: Sequence[str]) -> Counter[Ngram]:
    return Counter(
        tuple(text[i : i + n])
        for n in range(1, MAX_N + 1)
        for i in range(len(text) - n + 1)
    )


def _check(candidates: Sequence[str], references: References) -> None:
    if len(candidates) != len(references) or not candidates:
        raise InputError(
            f"got {len(candidates)} captions for {len(references)} images; "
            "want one for each, and at least one"
        )
    empty = [i for i, texts in enumerate(references) if not texts]
    if empty:
        raise InputError(f"images {empty[:5]} have no reference caption")


def main(argv: list[str]) -> None:
    answers, references = flags.FLAGS.answers, flags.FLAGS.references
    if len(argv) > 1 or not (answers and references):
        raise InputError(
            "give --answers=FILE.jsonl and --references=FILE.jsonl, no more"
        )
    print(json.dumps(report(*read_pairs(answers, references))))


if __name__ == "__main__":  # flags here: other commands import this file
    flags.DEFINE_string("answers", None, "JSON lines with `image` and `answer`.")
    flags.DEFINE_string("references", None, "JSON lines with `image` and `captions`.")
    errors.run(main)
