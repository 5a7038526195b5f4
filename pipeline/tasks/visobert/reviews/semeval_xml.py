"""Read the XML of SemEval 2014 task 4, 2015 task 12 and 2016 task 5 (Pontiki et al. 2014, 2015, 2016).

2014 has `aspectCategory` elements in each sentence, 2015 and 2016 have `Opinion` elements, in 2016 also for whole
reviews. Aspect terms are not read: they are words of the text, not aspects.
"""

from pathlib import Path
from xml.etree import ElementTree

from pipeline.errors import UserError

LAYOUT = "the XML of SemEval 2014, 2015 or 2016, with aspectCategory or Opinion elements"


def read_semeval(file: Path, content: bytes) -> tuple[list[str], list[list[list[str]]], list[str]]:
    """Return the texts, the labels of each as pairs of aspect and polarity, and notes.

    A text is a sentence, or a whole review if its opinions are about the whole. Sentences that are marked OutOfScope
    were not labelled, and are left out.

    Raises:
        UserError: the file is not XML, or has another layout.
    """
    try:
        root = ElementTree.fromstring(content)  # noqa: S314 (expat limits the expansion of entities, and opens no files)
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise UserError(f"{file}: not XML ({error})") from None
    units = root.findall("Review[Opinions]") or [
        sentence for sentence in root.iter("sentence") if sentence.find("text") is not None
    ]
    if not units:
        raise UserError(f"{file}: found <{root.tag}> without sentences, allowed: {LAYOUT}")
    scoped = [unit for unit in units if unit.get("OutOfScope", "").lower() != "true"]
    texts = [" ".join("".join(text.itertext()).strip() for text in unit.iter("text")) for unit in scoped]
    labels = [
        [[opinion.get("category", ""), opinion.get("polarity", "")] for tag in ("aspectCategory", "Opinion")
         for opinion in unit.iter(tag)]
        for unit in scoped
    ]  # fmt: skip
    if not any(labels) and root.find(".//aspectTerm") is not None:
        raise UserError(f"{file}: found aspectTerm elements only, allowed: {LAYOUT}")
    left_out = len(units) - len(scoped)
    return texts, labels, [f"{file}: {left_out} sentences are out of scope and left out"] * bool(left_out)
