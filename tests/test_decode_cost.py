"""What a step of the search does not do, in its compiled program: it copies no cache, and it keeps no prompt
more than once.
"""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import llama_models
import pytest
from continuing import END, MODEL

from experiments.config import Decode
from experiments.decoding.search import search
from lora_jax.models import Llama


MODELS = {
    "GPT-2": MODEL,
    "Llama": Llama(dataclasses.replace(llama_models.TINY["llama"], vocab_size=13)),
}
LAYERS = 2
# So that no other array of the programs is as large as the cache of a layer.
BATCH, WIDTH, NEW = 3, 16, 21


def program(model, beams):
    """The compiled text of the search."""
    section = Decode(max_tokens=NEW, batch=BATCH, beams=beams, no_repeat_ngram=3)
    params = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    ids = jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.int32)
    return search.lower(model, params, ids, ids, None, section=section, end=END).compile().as_text()


def sizes(text):
    """The number of elements of each float32 array that is named in `text`."""
    return [
        math.prod(map(int, filter(None, dims.split(",")))) for dims in re.findall(r"f32\[([\d,]*)\]", text)
    ]


def copied(text):
    """The elements of the largest float32 array that is copied or transposed, inside fusions too."""
    found = re.findall(r"= (f32\[[\d,]*\])\S* (?:copy|transpose)\(", text)
    return max(map(max, map(sizes, found)))


def elements(model, slots):
    """Of the keys of a layer."""
    return jax.eval_shape(lambda: model.init_cache(BATCH, slots)).layers[0][0].size


@pytest.mark.parametrize("beams", [1, 4])
@pytest.mark.parametrize("name", MODELS)
def test_no_cache_is_copied_and_the_beams_of_a_prompt_share_its_keys(name, beams):
    model, text = MODELS[name], program(MODELS[name], beams)
    prompt, slots = elements(model, WIDTH), WIDTH + beams * NEW
    cache = prompt * slots // WIDTH
    assert copied(text) < cache
    # What the loop over the steps carries: of each layer the keys and the values, in one row for all beams.
    carried = max((sizes(loop) for loop in re.findall(r"= (\(.*\)) while\(", text)), key=sum)
    assert carried.count(cache) == 2 * LAYERS and cache == max(carried)


def test_a_copy_is_seen():
    text = """
  %copy.3 = f32[3,2,4]{2,1,0} copy(%a), metadata={op_name="copy(x)"}
  ROOT %t = f32[5,2]{0,1} transpose(%b), dimensions={1,0}
  %fusion = f32[9,9]{1,0} fusion(%copy.3), kind=kLoop
"""
    assert copied(text) == 24 and sizes(text) == [24, 10, 81]
