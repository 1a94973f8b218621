"""The memory of texts: nothing is embedded twice, nothing stale is given, and it stays within its bound."""

import copy
import pickle
import threading

import pytest
import torch

from pixclip_hf.pipelines.text_embeddings import EmbeddedTexts, embed_texts


class Counted:
    """Embeds the keys of a memory and counts them."""

    def __init__(self, model, processor):
        self.model, self.processor, self.asked = model, processor, []

    def __call__(self, keys):
        self.asked.append(list(keys))
        with torch.no_grad():
            return embed_texts(self.model, self.processor, keys)


@pytest.fixture(params=["tiny_cloc", "tiny_pixclip"])
def counted(request):
    return Counted(*request.getfixturevalue(request.param))


def test_what_comes_again_is_embedded_once(counted):
    memory = EmbeddedTexts()
    first = memory.rows(counted.model, ["a", "b", "a"], counted)
    second = memory.rows(counted.model, ["c", "b", "a"], counted)
    assert counted.asked == [["a", "b"], ["c"]]
    assert torch.equal(first[0], first[2]) and torch.equal(second[1:], first[[1, 0]])
    assert not torch.equal(second[0], second[1])


def train(model):
    optimizer = torch.optim.AdamW(model.text_projection.parameters(), lr=1e-3)
    model.get_text_features(torch.tensor([[1, 5, 258]])).pooler_output.sum().backward()
    optimizer.step()


def load(model):
    model.load_state_dict({name: 1.5 * value for name, value in model.state_dict().items()})


def change_data(model):
    # As averages of weights are copied in: no version counts it.
    for parameter in model.text_projection.parameters():
        parameter.data.mul_(1.25)


def replace(model):
    projection = copy.deepcopy(model.text_projection)
    with torch.no_grad():
        for parameter in projection.parameters():
            parameter.neg_()
    model.text_projection = projection


def replace_data(model):
    for parameter in model.text_projection.parameters():
        parameter.data = parameter.data * 0.5


@pytest.mark.parametrize("change", [train, load, change_data, replace, replace_data])
def test_other_weights_are_never_answered_with_old_rows(counted, change):
    memory, texts = EmbeddedTexts(), ["a plain red disc", "b"]
    before = memory.rows(counted.model, texts, counted)
    change(counted.model)
    after = memory.rows(counted.model, texts, counted)
    with torch.no_grad():
        assert torch.equal(after, embed_texts(counted.model, counted.processor, texts))
    assert not torch.allclose(before, after, atol=1e-6)
    assert torch.equal(memory.rows(counted.model, texts, counted), after) and len(counted.asked) == 2


def test_other_models_and_the_vision_side(tiny_cloc, tiny_pixclip):
    memory, one, other = EmbeddedTexts(), Counted(*tiny_cloc), Counted(*tiny_pixclip)
    first = memory.rows(one.model, ["a"], one)
    assert not torch.allclose(memory.rows(other.model, ["a"], other), first)
    assert torch.equal(memory.rows(one.model, ["a"], one), first)
    with torch.no_grad():
        next(one.model.vision_model.parameters()).add_(1)
    memory.rows(one.model, ["a"], one)
    assert len(one.asked) == 2


def test_adapters_that_are_turned_off(counted):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(target_modules=r".*text_model\..*q_proj", init_lora_weights=False)
    model = peft.get_peft_model(counted.model, config).eval()
    counted.model, memory = model, EmbeddedTexts()
    adapted = memory.rows(model, ["a red disc"], counted)
    with model.disable_adapter():
        plain = memory.rows(model, ["a red disc"], counted)
    assert not torch.allclose(adapted, plain, atol=1e-6)
    assert torch.equal(memory.rows(model, ["a red disc"], counted), adapted)


def test_what_cannot_be_remembered_is_embedded_each_time(counted):
    memory = EmbeddedTexts()
    counted.model.train()
    for _ in range(2):
        memory.rows(counted.model, ["a"], counted)
    assert len(counted.asked) == 2 and len(memory) == 0
    counted.model.eval()
    with torch.inference_mode():
        counted.model.text_projection = copy.deepcopy(counted.model.text_projection)
        for parameter in counted.model.text_projection.parameters():
            parameter.data = parameter * 2
        counted.model.text_projection.register_buffer("made_in_inference_mode", torch.zeros(1))
    for _ in range(2):
        memory.rows(counted.model, ["a"], counted)
    assert len(counted.asked) == 4 and len(memory) == 0


def test_weights_that_change_meanwhile_are_not_remembered(counted):
    memory = EmbeddedTexts()

    def train_while_embedding(keys):
        rows = counted(keys)
        load(counted.model)
        return rows

    memory.rows(counted.model, ["a"], train_while_embedding)
    assert len(memory) == 0
    memory.rows(counted.model, ["a"], counted)
    assert len(counted.asked) == 2 and len(memory) == 1


def test_the_longest_unused_are_dropped(counted):
    memory = EmbeddedTexts(most=3)
    memory.rows(counted.model, ["a", "b", "c"], counted)
    memory.rows(counted.model, ["a", "d"], counted)
    assert len(memory) == 3
    memory.rows(counted.model, ["a", "c", "d"], counted)
    assert counted.asked == [["a", "b", "c"], ["d"]]
    rows = memory.rows(counted.model, list("efghij"), counted)
    assert rows.shape[0] == 6 and len(memory) == 3
    memory.rows(counted.model, list("hij"), counted)
    assert len(counted.asked) == 3
    # A row of a batch that stays must not keep the batch.
    (row,) = (memory._rows[key] for key in memory._rows if key == "h")
    assert row.untyped_storage().nbytes() == row.nbytes
    with pytest.raises(ValueError, match="`most` must be at least 1, got 0"):
        EmbeddedTexts(0)


def test_threads_share_what_is_embedded(counted):
    memory, results = EmbeddedTexts(), []
    barrier = threading.Barrier(4)

    def ask(number):
        barrier.wait()
        results.append(memory.rows(counted.model, ["a", "b", f"own {number}"], counted)[:2])

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(key for keys in counted.asked for key in keys) == ["a", "b", *(f"own {i}" for i in range(4))]
    assert all(torch.equal(result, results[0]) for result in results)


def test_copies_start_empty(counted):
    memory = EmbeddedTexts(most=5)
    memory.rows(counted.model, ["a"], counted)
    for other in (pickle.loads(pickle.dumps(memory)), copy.deepcopy(memory)):
        assert len(other) == 0 and other.most == 5
        other.rows(counted.model, ["a"], counted)
    assert len(counted.asked) == 3


def test_texts_that_a_cut_makes_equal_tie(tiny_cloc):
    with torch.no_grad():
        rows = embed_texts(*tiny_cloc, ["aaaaaa", "b", "aaaaab", "b"], max_length=5, batch_size=1)
        one_by_one = embed_texts(*tiny_cloc, ["aaaaab"], max_length=5)
    assert torch.equal(rows[0], rows[2]) and torch.equal(rows[1], rows[3])
    torch.testing.assert_close(rows[2:3], one_by_one)
