"""Law: a pattern from a file is refused, or matches in a moment."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_lightning.lora.targets.regexes import refusal
from tests.lora.accidents import REGEXES
from tests.lora.fuzz_support import within_bounds

NAMES = [
    *(
        "model.layers.0.self_attn.q_proj",
        "a" * 40,
        "a.a" * 15,
        "base_model.model.vision_tower.encoder.layers.11.mlp.fc1",
    ),
    "ab" * 20 + "!",
]
KNOWN = [
    *(
        "q_proj",
        ".*",
        r".*\.(q_proj|v_proj)",
        r"^model\.layers\.0\.self_attn\.q_proj$",
        r".*layer\.1.*(key|output\.dense)",
    ),
    r"^(?!.*(?:visual|vision_tower)).*\.(?:q|k|v|o|gate|up|down)_proj$",
    r"(.*\.)?layers\.(1[0-9]|2[0-3])\.mlp\.\w+",
    # unsloth's for language layers, attention and MLP, and the second for a model whose layers come without a tag
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj|lm_head).*?)|"
    r"(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense)\."
    r"(?:(?:k_proj|v_proj|q_proj|out_proj|fc1|fc2|o_proj|gate_proj|up_proj|down_proj|lm_head)))",
    "|".join(rf"model\.layers\.{i}\.self_attn\.{p}_proj" for i in range(80) for p in "qkvo"),
]
SLOW = [r"(a+)+!", r"([a-z_.0-9]+)+!", r"(a|a)*b", r"(?:ab|a)*c", r"(a?){40}a", "a?" * 40 + "a" * 40, "(a|a)" * 40]
SLOW += [".*" * 6 + "!", r"(?:\w*\.?){9}!", r"((a{0,9}){0,9}){0,9}!", r"(?=(.+)+!)q", r"(?:.*a){12}!"]
UNREADABLE = ["(", "q)|(v", "(?i)q", "(?x) q #", "a{99999999999999999999}", "(" * 5000 + ")" * 5000, "." * 200_000]


@pytest.mark.parametrize("pattern", KNOWN, ids=range(len(KNOWN)))
def test_patterns_that_people_write_are_taken(pattern):
    assert refusal(pattern) is None


@pytest.mark.parametrize("pattern", [*SLOW, *UNREADABLE], ids=lambda pattern: pattern[:20])
def test_patterns_that_hang_or_break_are_refused(pattern):
    assert len(refusal(pattern) or "") in range(10, 300)


def matches_quickly(pattern):
    """Or is refused."""
    with within_bounds(but=("compile",)):
        if refusal(pattern) is None:
            for name in NAMES:
                re.fullmatch(pattern, name)
                re.match(rf"(.*\.)?({pattern})$", name)


@pytest.mark.parametrize("pattern", REGEXES, ids=lambda pattern: pattern[:20])
def test_what_is_taken_matches_in_a_moment(pattern):
    matches_quickly(pattern)


PARTS = st.recursive(
    st.sampled_from(["a", "b", r"\.", ".", r"\w", "[ab.]", "", "$", r"\b"]),
    lambda part: st.one_of(
        st.tuples(part, part).map("".join),
        st.tuples(part, part).map(lambda two: f"(?:{two[0]}|{two[1]})"),
        st.tuples(part, st.sampled_from(["*", "+", "?", "*?", "{0,3}", "{2,}", "{5}", "{0,20}"])).map(
            lambda two: f"(?:{two[0]}){two[1]}"
        ),
        part.map(lambda inside: f"(?={inside})"),
    ),
    max_leaves=12,
)


@settings(max_examples=300)
@given(PARTS)
def test_whatever_is_taken_matches_in_a_moment(pattern):
    matches_quickly(f"{pattern}!")
