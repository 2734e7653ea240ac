"""Of which kind is a sentence: fact, hedge, method or meta? By rules in a fixed order, the first that fits decides.

    python -m kinds       prints the rules

What this can see is wording. It cannot see what a sentence means: a guess in plain words is a fact here, and a claim
that is dressed up as doubt ("it is unclear why naps cure cancer") is a hedge. Where rules are in doubt they say fact,
since facts are what must be cited; and what would be meta is a fact once it cites, quotes or states a figure, since
nothing else looks at meta. "May" and "could" alone make no hedge: what may be so needs a source, too. How often
the rules are right is measured in tests/client/test_split.py and printed in docs/claims.md.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

import mentions
from ledger import Kind


@dataclass(frozen=True)
class Rule:
    """Sentences for which `holds` says yes are of this kind."""

    kind: Kind
    says: str
    pattern: re.Pattern[str]


def _pattern(*alternatives: str) -> re.Pattern[str]:
    return re.compile("|".join(alternatives), re.I)


# Sections whose sentences are all meta: what would change the conclusion, and reference lists.
_CHANGE = _pattern(
    r"\b(?:what|which \w+) (?:else )?(?:would|could|might|may|can) (?:change|alter|overturn|revise|shift|falsify|refute)\b",
    r"\b(?:would|could) change (?:this|my|our|the)\b",
    r"\bfalsif(?:iab|icat|y)",
)
_REFERENCES = _pattern(
    r"^\W*(?:\d{1,2}[.)]\s*)?(?:references?(?: list)?|list of (?:references|sources)|bibliography|works cited|cited works|"
    r"literature(?: cited)?|sources(?: cited)?|citations|further reading)\W*$"
)

_SOURCES = r"(?:sources?|documents?|passages?|excerpts?|(?:retrieved|provided|available|given|supplied|listed) (?:studies|papers|articles|abstracts|records|texts|material))"
_SELF = r"(?:this|the present) (?:synthesis|summary|answer|text|overview|response|section)"
_COUNT = r"(?:no|none|all|most|many|some|several|few|both|each|any|neither|half|one|two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|\d{1,3})"
_SUBJECT = (
    rf"^(?:\w+(?: \w+)?, )?(?:only |almost |nearly )?(?:(?:{_COUNT} )?(?:of )?(?:the |these |those )?(?:{_COUNT} )?)"
    rf"(?:(?:retrieved|provided|available|given|numbered|cited|remaining|other|included|most|recent|older|newer|relevant) ){{0,3}}{_SOURCES}\b(?! of\b)"
)
# "The sources report a loss", "the sources agree that …": what they say is a claim about the world.
_RELAYS = _pattern(
    r"\b(?:reports?|shows?|finds?|found|indicates?|suggests?|supports?|confirms?|concludes?|claims?|states?|says?|demonstrates?|estimates?|agree|describes?)\b"
    r"(?! (?:no\b|nothing|on\b|only on|in\b))"
)
_NOTHING = _pattern(r"^(?:\w+, )?(?:no|none|neither|nothing)\b", r"\b(?:do|does|did)(?: not|n't)\b", r"\bcannot\b")

_RESULT = _pattern(
    r"\b(?:improv|reduc|increas|decreas|lower|rais|rose\b|fell\b|fall\b|higher|fewer|better|worse|larger|smaller|weaker|stronger|grew\b|shrank|associat|predict|correlat|found\b|show|report|disappear|vanish|fail|succeed|benefit(?:s|ed)\b|caus|prevent|doubl(?:ed|es|ing)\b|double the|halv|cure[ds]?\b|kill|protect|extend|shorten|reliev|outperform|gain|declin|learned|recover|work(?:s|ed)\b|differ(?:s|ed)?\b|no difference|significan|dropped out|effects? (?:was|were|of|on)|more .{1,40} than|less .{1,40} than)",
    r"\b(?:d|r|g|p|OR|RR|HR|β|beta)\s*[=<>]",
    r"\bhalf\b|\bper cent\b|\d\s?%|\bCI\b",
)

_HEDGE = _pattern(
    r"\b(?:is|are|was|were|remains?|seems?|stays?|still|yet|largely)\b(?: \w+){0,3} (?:unclear|unknown|uncertain|unproven|untested|unresolved|undetermined|unexplained|debated|disputed|contested|controversial|speculative|tentative|inconclusive|preliminary|imprecise|insufficient|mixed|open)\b(?! to)",
    r"\bnot(?: yet| ever)?(?: been)?(?: \w+ly)? (?:known|clear|established|settled|understood|shown|proven|proved|demonstrated|studied|tested|examined|investigated|determined|resolved|certain|replicated yet)\b",
    r"\bpoorly understood\b|\b(?:little|less|not much|nothing) is known\b|\b(?:do|does|did)(?: not|n't)(?: yet)? know\b|\bno ?one knows\b",
    r"\b(?:cannot|can ?not|can't|could not)(?: yet)?(?: be)? (?:tell|say|told|said|determine|determined|establish|established|infer|inferred|ruled|rule|conclude|concluded|excluded?|distinguish|distinguished|separated?|known|answered)\b",
    r"\bimpossible to (?:say|tell|know)\b|\bhard to (?:say|tell|know)\b",
    r"\bremains? (?:to be|an? open|open|a matter|poorly)\b|\bopen question\b|\bmatter of (?:debate|dispute)\b",
    r"\binconclusive\b|\binsufficient (?:evidence|data|information)\b|\btoo (?:limited|few|small|imprecise|weak|scarce|sparse) to\b",
    r"\b(?:evidence|data|research|studies|trials|replications?|confirmation|information)\b.{0,50}\b(?:is|are|remains?) (?:\w+ )?(?:limited|lacking|scarce|sparse|missing|absent|thin|mixed|weak|low)\b",
    r"^(?:replication|confirmation|evidence) is (?:lacking|missing)",
    r"\b(?:certainty|confidence|quality)\b.{0,40}\b(?:is|are|remains?) (?:very |rather |still )?(?:low|limited|moderate|weak)\b",
    r"\b(?:more|further|larger|better|future|longer|additional|independent)\b.{0,40}\b(?:is|are|will be|would be) (?:needed|required|necessary)\b",
    r"\bshould be (?:interpreted|read|treated|regarded|viewed|taken)\b|\bwith (?:caution|care)\b|\bmust be regarded as\b",
    r"^(?:if|unless|assuming|provided that|were|should)\b.{0,200}\b(?:would|could|might|may|must|is weaker|are weaker|cannot)\b|^if\b.{0,100}, the (?:evidence|result|finding|estimate)\b",
    r"^(?:whether|how long|how much|why)\b.{0,120}\b(?:not|unclear|unknown|uncertain|open|unresolved)\b",
    r"\b(?:may|might) not (?:generali[sz]e|hold|apply|extend|transfer|carry over)\b",
    r"\bno (?:\w+ )?conclusions? (?:can|could|may|is|are|about)\b|\b(?:do|does|did) not (?:allow|permit|support|justify) (?:a |any )?(?:\w+ )?conclusions?\b",
    r"\bno (?:\w+ )?(?:evidence|data|information) (?:on|about|regarding|for whether)\b",
    r"\bno (?:\w+ )?(?:trial|study|experiment|replication|studies|trials)\b.{0,15}\b(?:has|have) (?:yet |ever |so far )?(?:tested|examined|studied|compared|looked|measured|addressed|been)\b",
    r"\bawaits? (?:\w+ )?(?:replication|confirmation)\b",
)

_METHOD = _pattern(
    r"\b(?:participants|subjects|volunteers|patients|nurses|students|children|rats|mice)\b.{0,30}\b(?:were|completed|rated|received|took part|gave|drank)\b",
    r"\brandomi[sz]ed \d|\brandomly (?:assigned|allocated)|\bat random\b|\bin random order\b|\bassigned to\b",
    r"\b(?:double|single|triple)-blind\b|\bblind(?:ed)? to\b|\bcrossover\b|\bquasi-experimental\b|\bcase-control\b",
    r"\b(?:it|this|the study) was an? (?:\w+ ){0,3}(?:study|trial|experiment|survey|review)\b",
    r"\bprereg|\bwas registered\b|\brecruited\b|\benrolled\b|\bprotocol\b|\bconsent\b",
    r"\bsamples? (?:was|were|of|consisted|comprised|included)\b|\bconsisted of\b",
    r"\b(?:was|were)(?: \w+ly| then)? (?:measured|assessed|scored|coded|rated|timed|recorded|collected|taken|tested|pooled|scanned|transcribed|interviewed|weighed|sampled|followed|surveyed|held|repeated|kept|eligible|excluded|instructed|asked|given)\b",
    r"\bdata (?:came|come|were drawn) from\b|\bquestionnaire\b|\bfollow-?up (?:lasted|was)\b|\bcontrol group received\b",
    r"\bsearched\b.{0,30}\bdatabases\b|\b(?:included|covers?|covered|pooled|analy[sz]ed|combined) (?:\w+ )?[\d,]+\b",
    r"\b(?:followed|surveyed|scanned|interviewed|tracked|compared|examined|tested) (?:(?!in |by )\w+ )?(?:(?!(?:19|20)\d\d\b)[\d,]{2,}|two|three|four|five|six|ten)\b",
    r"\b(?:controlled|adjusted|controls) for\b|\bused an? (?:\w+[ -]){0,3}design\b|\bdose was\b|\boutcome was\b|\bcoded\b",
)

# In this order. What a pattern cannot say is in `of`.
RULES = (
    Rule("meta", "under a heading like “What would change this”", _CHANGE),
    Rule("meta", "under the heading of a reference list", _REFERENCES),
    Rule("meta", "a question", re.compile(r"[?？؟][\"'”’»)\]*_]*$")),
    Rule(
        "meta",
        "a lead-in: ends with a colon, states no number, and is short or announces a list",
        _pattern(
            r"\b(?:following|follows|below|these|summari[sz]e|summary|conclusion|sources?|points?|findings?|reasons?|limit\w*|include)\b"
        ),
    ),
    Rule(
        "meta",
        "speaks of this text",
        _pattern(
            rf"\b{_SELF} (?:\w+ )?(?:is|are|was|draws?|covers?|summari[sz]es|relies|leaves|looks?|focuses|turns?|does|cannot|can|sets?|reviews?|describes?|deals?|only|addresses)\b",
            r"^(?:the )?(?:next|following|previous|last) (?:section|paragraph|part)\b",
            r"^(?:here (?:is|are)|below\b|in what follows|let me\b|please\b|i hope\b|feel free\b|thank)",
            r"^(?:in|to) (?:summary|summari[sz]e|conclusion|short|sum)\W*$",
            r"\bI (?:could|can|cannot|have|will|would|relied|found no|was unable|am|did not|do not)\b",
        ),
    ),
    Rule(
        "meta",
        "speaks of the sources as a whole, and does not relay what they say",
        _pattern(
            _SUBJECT,
            rf"\b(?:cannot|could not|can not|not|no|nothing)\b.{{0,60}}\b(?:in|from|by|on) (?:the |these )?(?:\w+ )?{_SOURCES}\b",
        ),
    ),
    Rule("hedge", "says that something is unknown, uncertain, not shown, or only so on a condition", _HEDGE),
    Rule("method", "says how a study was done, and no result", _METHOD),
)

# Clauses of a sentence that grants something first: "Naps help, but it is unclear why." Both must hedge. Of clauses that
# are only strung together ("…, and more trials are needed") those that do not hedge must at least state no result.
_CLAUSES = re.compile(
    r"; |, (?:but|although|though|whereas|while|yet|and yet) |^(?:although|while|whereas|though) ", re.I
)
_STRUNG = re.compile(r", (?:and|so|which|because) ", re.I)
_GRANTED = re.compile(r"^(?:although|while|whereas|though) ", re.I)
_LONGEST_LEAD_IN = 5
_SHORTEST_CLAUSE = 3


def changes(heading: str) -> bool:
    """Is this the heading of the part that says what would change the conclusion?"""
    return bool(_CHANGE.search(heading))


def lists_references(heading: str) -> bool:
    """Is this the heading of a reference list?"""
    return bool(_REFERENCES.search(heading))


# --- numbers and quotations -------------------------------------------------------------------------------------------

# A number that is said of something: not a part of a name (COVID-19, B12), nor one that counts parts (Study 2).
_NUMBER = re.compile(r"(?<![\w])(?<![^\W\d_][-‐‑–])(?<!\d[.,])\d")
_LABEL = re.compile(
    r"\b(?:study|studies|experiment|trial|table|fig|figure|type|phase|section|step|question|wave|chapter|grade|part|no|"
    r"point|group|condition|hypothesis|version|model|appendix|option|source|sources|stage|aim|outcome)s?\.?\s*$",
    re.I,
)
# What the figures of a sentence about this text may say: how many sources there are, and of which years.
_OF_SOURCES = re.compile(
    rf"\d{{1,3}} (?:(?:out )?of (?:the )?(?:\d{{1,3}} )?)?(?:(?:retrieved|provided|available|given|numbered|cited|listed|"
    rf"remaining|other|included|most|recent|older|newer|relevant) ){{0,3}}{_SOURCES}\b(?! of\b)",
    re.I,
)
_IN_YEAR = re.compile(
    r"\b(?:in|since|from|until|between|before|after|to|and|through) (?=(?:1[5-9]|20)\d\d(?: ?(?:$|[.,;:)?!–-])| (?:to|and|until)\b))",
    re.I,
)
_PER_CENT = re.compile(r"\bper ?cent\b", re.I)
_QUOTED = re.compile('[“„"«]([^“”„"«»]*)[”“"»]|‘([^‘’]*)’|「([^「」]*)」')
_SHORTEST_QUOTE = 3  # words


def number(said: str, named: Iterable[mentions.Mention]) -> str | None:
    """The first number that is said of something; years of `named` works are none."""
    place = _number_at(said, {mention.year_span[0] for mention in named if mention.year_span})
    return None if place is None else said[place : place + 30].split()[0].rstrip(".,;:)")


def _number_at(said: str, skipped: set[int]) -> int | None:
    for match in _NUMBER.finditer(said):
        if match.start() not in skipped and not _LABEL.search(said[max(0, match.start() - 20) : match.start()]):
            return match.start()
    return None


def states_figure(said: str) -> bool:
    """Does this say a figure of the world: not of how many sources there are, nor only in which year?"""
    if _PER_CENT.search(said):
        return True
    if not any(char.isdigit() for char in said):
        return False
    said = unicodedata.normalize("NFC", said)
    skipped = {mention.year_span[0] for mention in mentions.find(said) if mention.year_span}
    for match in _OF_SOURCES.finditer(said):
        skipped |= {match.start() + digit.start() for digit in _NUMBER.finditer(match.group())}
    skipped |= {match.end() for match in _IN_YEAR.finditer(said)}
    return _number_at(said, skipped) is not None


def _quotes(said: str) -> bool:
    return any(len("".join(match.groups("")).split()) >= _SHORTEST_QUOTE for match in _QUOTED.finditer(said))


def of(bare: str, cites: bool = False, closing: bool = False) -> Kind:
    """The kind of a sentence. `cites`: it has a citation; `closing`: it stands in a part where all is meta by itself."""
    kind = "meta" if closing else _by_wording(bare, cites)
    if kind != "meta" or not any(char.isalnum() for char in bare):
        return kind
    return "fact" if cites or states_figure(bare) or _quotes(bare) else "meta"


def _by_wording(bare: str, cites: bool) -> Kind:
    words = bare.split()
    if not any(char.isalpha() for char in bare):
        return "fact" if any(char.isdigit() for char in bare) else "meta"
    question, lead_in, self_, sources = (rule.pattern for rule in RULES[2:6])
    if question.search(bare):
        return "meta"
    if bare.endswith((":", "：")) and not cites and not any(char.isdigit() for char in bare):  # noqa: SIM102
        if len(words) <= _LONGEST_LEAD_IN or (lead_in.search(bare) and not _RESULT.search(bare)):
            return "meta"
    if self_.search(bare) and not re.search(r"\b(?:shows?|finds?|concludes?) that\b", bare, re.I):
        return "meta"
    if sources.search(bare) and (_NOTHING.search(bare) or not _RELAYS.search(bare)):
        return "meta"
    if _HEDGE.search(bare) and all(map(_hedges, _clauses(bare))):
        return "hedge"
    if _METHOD.search(bare) and not _RESULT.search(bare):
        return "method"
    return "fact"


def _hedges(clause: str) -> bool:
    return bool(_HEDGE.search(clause)) and not any(
        _RESULT.search(part) and not _HEDGE.search(part) for part in _STRUNG.split(clause)
    )


def _clauses(bare: str) -> list[str]:
    if _GRANTED.search(bare):
        bare = bare.replace(", ", "; ", 1)
    clauses = [clause for clause in _CLAUSES.split(bare) if len(clause.split()) >= _SHORTEST_CLAUSE]
    return clauses or [bare]


def rules() -> str:
    """The rules as text, in the order in which they are tried."""
    lines = [f"{number}. {rule.kind}: {rule.says}" for number, rule in enumerate(RULES, 1)]
    last = "fact: everything else, and what 1 to 6 call meta if it cites, quotes three words or states a figure"
    return "\n".join([*lines, f"{len(lines) + 1}. {last}"])


if __name__ == "__main__":
    print(rules())
    for rule in RULES:
        print(f"\n{rule.kind}, {rule.says}:")
        print("\n".join(f"    {part}" for part in rule.pattern.pattern.split("|\\b")))
