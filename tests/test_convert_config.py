"""`python -m convert config`: numbers kept, and no key lost in silence."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from absl import flags
from absl.testing import flagsaver
from ml_collections import ConfigDict, config_flags

from configs import generate
from convert import config, config_keys, yaml_files
from minigpt4_jax import optim, run_config
from minigpt4_jax.errors import ConfigError, InputError

ROOT = Path(__file__).parent.parent


def dataset(batch_size: int, ratio: int | None = None) -> dict:
    processors = {
        "vis_processor": {"train": {"name": "blip2_image_train", "image_size": 224}},
        "text_processor": {"train": {"name": "blip_caption"}},
    }
    ratios = {} if ratio is None else {"sample_ratio": ratio}
    return {"batch_size": batch_size, **processors, **ratios}


def stage_1(model_type: str) -> dict:
    """The keys and numbers of the reference's train config, as the spec has them."""
    run = {
        "task": "image_text_pretrain",
        "lr_sched": "linear_warmup_cosine_lr",
        "init_lr": 1e-4,
        "min_lr": 8e-5,
        "warmup_lr": 1e-6,
        "weight_decay": 0.05,
        "max_epoch": 4,
        "num_workers": 4,
        "warmup_steps": 5000,
        "iters_per_epoch": 5000,
        "seed": 42,
        "output_dir": "output/here",
        "amp": True,
        "resume_ckpt_path": None,
        "evaluate": False,
        "train_splits": ["train"],
        "device": "cuda",
        "world_size": 1,
        "dist_url": "env://",
        "distributed": True,
        "wandb_log": True,
        "job_name": "a_job",
    }
    return {
        "model": {"arch": "minigpt4", "model_type": model_type},
        "datasets": {"laion": dataset(64, 115), "cc_sbu": dataset(64, 14)},
        "run": run,
    }


def stage_2(model_type: str) -> dict:
    vicuna = model_type == "pretrain_vicuna0"
    template = "###Human: {} ###Assistant: " if vicuna else "[INST] {} [/INST] "
    values = stage_1(model_type)
    values["model"] |= {
        "max_txt_len": 160,
        "end_sym": "###" if vicuna else "</s>",
        "prompt_path": "prompts/alignment.txt",
        "prompt_template": template,
        "ckpt": "/of/stage/1",
    }
    values["datasets"] = {"cc_sbu_align": dataset(12)}
    values["run"] |= {"init_lr": 3e-5, "min_lr": 1e-5, "warmup_steps": 200}
    values["run"] |= {"max_epoch": 5, "iters_per_epoch": 200}
    return values


def demo(model_type: str) -> dict:
    values = stage_2(model_type)
    values["model"]["low_resource"] = True
    del values["model"]["prompt_path"], values["datasets"]["cc_sbu_align"]["batch_size"]
    return {**values, "run": {"task": "image_text_pretrain"}}


VICUNA, LLAMA2 = "pretrain_vicuna0", "pretrain_llama2"
TRAINED = [stage_1(VICUNA), stage_2(VICUNA), stage_1(LLAMA2), stage_2(LLAMA2)]


@pytest.fixture
def file(tmp_path):
    """Writes values, or text, as a YAML file."""

    def write(values) -> Path:
        path = tmp_path / "theirs.yaml"
        text = values if isinstance(values, str) else yaml.safe_dump(values)
        path.write_text(text)
        return path

    return write


def loaded(text: str, folder: Path) -> ConfigDict:
    """A config as the trainer's --config reads it."""
    path = folder / "ours.py"
    path.write_text(text)
    values = flags.FlagValues()
    holder = config_flags.DEFINE_config_file("config", flag_values=values)
    values(["train", f"--config={path}"])
    return holder.value


@pytest.mark.parametrize(
    "values, checkpoint, loss, row",
    [
        (TRAINED[0], "minigpt4-7b", "captions", (1 + 32 + 31, 32)),
        (TRAINED[1], "minigpt4-7b", "descriptions", (1 + 32 + 27 + 159, 160)),
        (TRAINED[2], "minigpt4-llama2-7b", "captions", (1 + 64 + 31, 32)),
        (TRAINED[3], "minigpt4-llama2-7b", "descriptions", (1 + 64 + 26 + 159, 160)),
    ],
)
def test_the_references_trainings_keep_their_numbers(
    file, tmp_path, values, checkpoint, loss, row
):
    cfg = loaded(config.convert(file(values), []), tmp_path)
    run_config.check(cfg)
    assert (cfg.checkpoint, cfg.loss, cfg.init) == (checkpoint, loss, "")
    assert cfg.trainable == ("projector/.*",)
    assert (cfg.row.tokens, cfg.row.answers) == row
    assert (cfg.seed, cfg.loader.workers) == (42, 4)
    first = loss == "captions"
    assert cfg.optim.to_dict() == {
        "schedule": "linear_warmup_cosine_lr",
        "peak_lr": 1e-4 if first else 3e-5,
        "end_lr": 8e-5 if first else 1e-5,
        "warmup_lr": 1e-6,
        "warmup_steps": 5000 if first else 200,
        "epoch_steps": 5000 if first else 200,
        "total_steps": 20_000 if first else 1000,
        "decay_rate": 1.0,
        "b1": 0.9,
        "b2": 0.999,
        "eps": 1e-8,
        "weight_decay": 0.05,
        "clip_norm": 0.0,
        "accumulate": 1,
    }
    assert cfg.text.clean == ("blip" if first else "")
    assert (cfg.text.limit, cfg.text.captions) == (32 if first else 160, "one")
    assert cfg.batch_size == (64 if first else 12)
    epoch = 5000 if first else 200
    assert cfg.save_every == cfg.eval_every == cfg.keep.every == epoch
    weights = {name: source.weight for name, source in cfg.data.items()}
    assert weights == ({"laion": 115, "cc_sbu": 14} if first else {"cc_sbu_align": 1})
    assert run_config.reference_differences(cfg) == [
        *(["batch_size: 64, the reference has 256"] if first else []),
        *run_config.DEVIATIONS,
    ]


@pytest.mark.parametrize(
    "values", [*TRAINED, demo(VICUNA), demo(LLAMA2)], ids=lambda v: v["run"].get("seed")
)
def test_every_key_becomes_a_knob_or_a_line_of_the_header(file, values):
    path = file(values)
    text = config.convert(path, [])
    header = text.partition("from ml_collections")[0]
    trains = "init_lr" in values["run"]
    rows = config_keys.TRAIN if trains else config_keys.EVAL
    for key in yaml_files.read(path):
        assert config_keys.find(rows, key).knob or f": {key} = " in header, key
    low = "not expressible yet: model.low_resource = True (8-bit weights are a knob: config.quantize)"
    assert (low in header) != trains


def later(text: str) -> dict[str, str]:
    """Keys that are not expressible yet, and what is said of each."""
    start = "# not expressible yet: "
    lines = [s.removeprefix(start) for s in text.splitlines() if s.startswith(start)]
    return {line.partition(" = ")[0]: line.partition(" = ")[2] for line in lines}


def test_what_the_trainer_cannot_do_is_said_with_value_and_reason(file):
    text = config.convert(file(stage_1(VICUNA)), [])
    assert set(later(text)) == {"run.amp"}
    assert later(text)["run.amp"].startswith(
        "True (float16 with a loss scaler; here bf"
    )
    assert f"# {config.FRESH['captions']}" in text
    text = config.convert(file(stage_2(VICUNA)), [])
    assert set(later(text)) == {"run.amp", "model.ckpt"}
    assert later(text)["model.ckpt"].startswith("'/of/stage/1' (cfg.init takes a .pth,")
    assert "no model.ckpt" not in text
    assert "# same here: model.end_sym = '###'" in text
    options = ["model.end_sym='</s>'", "model.prompt_path=prompts/mine.txt"]
    options += ["run.valid_splits=[val]", "run.accum_grad_iters=4"]
    said = later(config.convert(file(stage_2(VICUNA)), options))
    assert said["model.end_sym"] == "'</s>' (answers here end in '###')"
    assert "the four of the reference's prompts/alig" in said["model.prompt_path"]
    assert "cfg.val names a data set of its own" in said["run.valid_splits"]
    assert "here it is their mean" in said["run.accum_grad_iters"]


def test_a_default_that_is_not_ours_is_said_too(file):
    values = stage_2(VICUNA)
    del values["model"]["end_sym"], values["model"]["ckpt"]
    text = config.convert(file(values), [])
    assert "yet: model.end_sym = '\\n', its default (answers here end in '###')" in text
    assert f"# {config.FRESH['descriptions']}" in text


def test_a_checkpoint_and_folders_of_shards_become_paths(file, tmp_path):
    def made(values, *options):
        text = config.convert(file(values), list(options))
        return text, loaded(text, tmp_path)

    text, cfg = made(
        TRAINED[0],
        "datasets.laion.build_info.storage=/big/laion/{00000..10488}.tar",
        "datasets.cc_sbu.build_info.storage=[/a.tar, /b.tar]",
    )
    assert (cfg.data.laion.path, cfg.data.cc_sbu.path) == ("/big/laion", "")
    assert "--config.data.cc_sbu.path=...\n" in text
    assert "data.laion.path" not in text
    assert "datasets.cc_sbu.build_info.storage" in later(text)
    text, cfg = made(
        TRAINED[1],
        "datasets.cc_sbu_align.build_info.storage=/data/cc_sbu_align/",
        "model.ckpt=/runs/checkpoint_3.pth",
    )
    assert (cfg.data.cc_sbu_align.path, cfg.init) == (
        "/data/cc_sbu_align/",
        "/runs/checkpoint_3.pth",
    )
    assert set(later(text)) == {"run.amp"}
    run_config.check_given(cfg)


@pytest.mark.parametrize(
    "ratios, weights",
    [
        ((115, 14), [115, 14]),
        ((0.5, 1.25), [2, 5]),
        (("0.3", 0.1), [3, 1]),
        ((None, None), [1, 1]),
    ],
)
def test_ratios_become_whole_weights(file, tmp_path, ratios, weights):
    values = stage_1(VICUNA)
    for source, ratio in zip(values["datasets"].values(), ratios):
        source["sample_ratio"] = ratio
    cfg = loaded(config.convert(file(values), []), tmp_path)
    assert [cfg.data.laion.weight, cfg.data.cc_sbu.weight] == weights


def test_captions_are_cleaned_where_all_data_sets_clean_them(file, tmp_path):
    def clean(*options):
        text = config.convert(file(TRAINED[0]), list(options))
        return loaded(text, tmp_path).text.clean, set(later(text)) - {"run.amp"}

    name = "datasets.{}.text_processor.train.name"
    laion, cc_sbu = name.format("laion"), name.format("cc_sbu")
    assert clean() == ("blip", set())
    assert clean(f"{laion}=other") == ("", {laion, cc_sbu})
    words = "datasets.laion.text_processor.train.max_words"
    assert clean(f"{words}=30") == ("blip", {words})
    assert clean(f"{words}=50") == ("blip", set())


def test_the_warmup_and_both_schedules_are_those_of_the_reference(file, tmp_path):
    def made(*options):
        text = config.convert(file(TRAINED[0]), list(options))
        assert set(later(text)) == {"run.amp"}
        cfg = loaded(text, tmp_path)
        run_config.check(cfg)
        return cfg.optim

    rate = optim.schedule(made())  # the numbers are the spec's
    for step, value in (
        (0, 1e-6),
        (4999, 9.99802e-5),
        (5000, 9.707107e-5),
        (10_000, 9e-5),
    ):
        assert float(rate(step)) == pytest.approx(value, rel=1e-6)
    assert made("run.warmup_lr=-1").warmup_lr == 1e-4  # from its peak, so at its peak
    assert made("run.warmup_lr=1").warmup_lr == 1e-4  # which the reference cuts it at
    stairs = "run.lr_sched=linear_warmup_step_lr"
    rate = optim.schedule(made(stairs, "run.lr_decay_rate=0.9", "run.warmup_steps=100"))
    assert float(rate(4999)) == pytest.approx(1e-4)
    assert float(rate(10_000)) == pytest.approx(8.1e-5)
    with pytest.raises(
        ConfigError, match="lr_decay_rate absent; linear_warmup_step_lr"
    ):
        made(stairs)


def test_batches_whose_gradients_add_up_are_parts_of_one_step(file, tmp_path):
    def made(parts):
        text = config.convert(file(TRAINED[1]), [f"run.accum_grad_iters={parts}"])
        return loaded(text, tmp_path)

    cfg = made(4)
    run_config.check(cfg)
    assert (cfg.batch_size, cfg.optim.accumulate) == (48, 4)
    assert (cfg.optim.total_steps, cfg.optim.epoch_steps) == (250, 50)
    assert cfg.optim.warmup_steps == cfg.save_every == 50
    with pytest.raises(
        ConfigError, match="iters_per_epoch=200, run.accum_grad_iters=3"
    ):
        made(3)


def test_what_is_not_frozen_is_trained(file, tmp_path):
    def trainable(*options):
        text = config.convert(file(TRAINED[0]), list(options))
        return loaded(text, tmp_path).trainable, text

    thawed = "model.freeze_qformer=False", "model.freeze_vit=False"
    assert trainable(thawed[0])[0] == ("qformer/.*", "projector/.*")
    patterns, text = trainable(*thawed)
    assert patterns == ("vit/.*", "ln_vision/.*", "qformer/.*", "projector/.*")
    assert "model.freeze_vit" not in text
    with pytest.raises(ConfigError, match="freeze_vit: got 'no way', want true or"):
        trainable("model.freeze_vit=no way")


def test_the_demo_and_an_evaluation_become_configs_for_generate(file, tmp_path):
    cfg = loaded(config.convert(file(demo(VICUNA)), []), tmp_path)
    assert set(cfg) == set(generate.get_config())
    sampling = cfg.temperature, cfg.top_k, cfg.top_p, cfg.repetition_penalty
    assert (*sampling, cfg.max_tokens) == (1.0, 50, 0.9, 1.05, 300)
    values = demo(VICUNA)
    sets = {"img_path": "/i", "eval_file_path": "/e", "max_new_tokens": 20}
    values["evaluation_datasets"] = {"vsr": {**sets, "batch_size": 10}}
    text = config.convert(file(values), ["run.num_beams=5", "run.min_length=4"])
    cfg = loaded(text, tmp_path)
    sampling = cfg.temperature, cfg.top_k, cfg.top_p, cfg.repetition_penalty
    assert (*sampling, cfg.max_tokens, cfg.batch_size) == (0.0, 0, 1.0, 1.0, 20, 10)
    assert cfg.min_tokens == 3  # the reference counts its dummy first id
    assert (cfg.num_beams, cfg.length_penalty) == (5, 1.0)
    assert "not expressible yet: evaluation_datasets.vsr.img_path = '/i'" in text


def test_the_name_of_the_llama_chooses_the_preset(file):
    for name, wanted in (
        ("/models/vicuna-13b-v0/", "minigpt4-13b"),
        ("/13b/vicuna_7B", "minigpt4-7b"),
        ("vicuna13b", "minigpt4-13b"),
        ("/a7b3/vicuna", "minigpt4-7b"),
    ):
        text = config.convert(file(TRAINED[0]), [f"model.llama_model={name}"])
        assert f'cfg.checkpoint = "{wanted}"' in text, name
    with pytest.raises(ConfigError, match="of 13B; the presets of .* have 7B"):
        config.convert(file(TRAINED[2]), ["model.llama_model=llama-13b"])
    with pytest.raises(ConfigError, match="did you mean 'minigpt4/pretrain_vicuna0'"):
        config.convert(file(TRAINED[0]), ["model.model_type=pretrain_vicuna"])


def test_all_unknown_keys_are_named_at_once_with_the_nearest(file):
    values = stage_1(VICUNA)
    values["run"]["init_rl"] = 1
    values["datasets"]["laion"]["bach_size"] = 3
    values["trainer"] = {"x": {"qqqq": 1}}
    with pytest.raises(ConfigError) as error:
        config.convert(file(values), [])
    text = str(error.value)
    assert text.startswith("3 unknown keys: ")
    assert "run.init_rl (did you mean run.init_lr?)" in text
    assert "laion.bach_size (did you mean datasets.laion.batch_size?)" in text
    assert "trainer.x.qqqq (none near)" in text


def test_options_win_and_the_last_of_them(file, tmp_path):
    options = [
        "run.seed=1 run.seed=2",
        "run.beta2=0.98,run.train_splits=[train, val],run.world_size=4",
    ]
    text = config.convert(file(TRAINED[0]), options)
    cfg = loaded(text, tmp_path)
    assert (cfg.seed, cfg.optim.b2, cfg.batch_size) == (2, 0.98, 4 * 64)
    assert "run.train_splits = ['train', 'val'] (" in text
    for option, complaint in (
        ("run.seed", "got 'run.seed', want a.b=c"),
        ("run.seed.x=1", "run.seed is 42, no section"),
    ):
        with pytest.raises(InputError, match=complaint):
            config.convert(file(TRAINED[0]), [option])


@pytest.mark.parametrize("spelled", ["1e-4", '"1e-4"', "1.0e-4", "0.0001"])
def test_a_number_is_one_however_it_is_spelled(file, tmp_path, spelled):
    text = yaml.safe_dump(TRAINED[0]).replace("init_lr: 0.0001", f"init_lr: {spelled}")
    assert spelled in text
    cfg = loaded(config.convert(file(text), []), tmp_path)
    assert cfg.optim.peak_lr == 1e-4


@pytest.mark.parametrize(
    "option, complaint",
    [
        ("run.init_lr=fast", "run.init_lr: got 'fast', want a number"),
        ("run.min_lr=.nan", "run.min_lr: got nan, want a number"),
        ("run.warmup_lr=true", "run.warmup_lr: got True, want a number"),
        ("run.max_epoch=1.5", "run.max_epoch: got 1.5, want a whole number"),
        ("run.seed=", "run.seed absent"),
        ("run.min_lr=1", "must fall from a peak"),
        (
            "datasets.laion.batch_size=32",
            "cc_sbu.batch_size=64, datasets.laion.batch_size=32",
        ),
        ("run.lr_sched=cosine", "unknown run.lr_sched 'cosine'"),
        ("model.max_txt_len=0", "model.max_txt_len: got 0, want at least 1"),
        ("datasets.laion.sample_ratio=0", "laion.sample_ratio=0; want ratios above 0"),
        (
            "datasets.laion.sample_ratio=",
            "laion.sample_ratio absent beside datasets.cc",
        ),
        ("datasets.a-b.batch_size=64", "datasets.a-b: it becomes a knob; want a name"),
        ("datasets.class.batch_size=64", "datasets.class: it becomes a knob"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_the_name_of_its_key(
    file, option, complaint
):
    with pytest.raises(ConfigError) as error:
        config.convert(file(TRAINED[0]), [option])
    assert complaint in str(error.value)


@pytest.mark.parametrize(
    "text, complaint",
    [
        ("- a\n- b\n", "want keys and values"),
        ("", "got None, want keys and values"),
        ("model: {arch: minigpt4}\nrun: 3\n", "got datasets: 'nothing'"),
        ("model: [1, 2\nrun: {}\n", "line 2: cannot read "),
        ("a: &x 1\nb: *x\n", "line 2: cannot read an alias"),
        ("run:\n  seed: 1\n  seed: 2\n", "line 3: cannot read the key 'seed' a second"),
        ("a: 1\n---\nb: 2\n", "but found another document"),
        ("a: 2023-99-99\n", "not readable as YAML"),
        ("[" * 5000, "not readable as YAML"),
        ("a b: 1\n", "'a b': want a key of letters"),
        ("a: \x01\n", "not readable as YAML"),
    ],
)
def test_what_is_no_config_is_refused_in_words(file, text, complaint):
    with pytest.raises(ConfigError) as error:
        config.convert(file(text), [])
    assert complaint in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("how", ["file", "option"])
@pytest.mark.parametrize("tag", ["object/apply:os.mkdir", "object/new:os.mkdir"])
def test_a_tag_that_would_run_code_runs_nothing(file, tmp_path, tag, how):
    made = tmp_path / "made"
    evil = f"!!python/{tag} [{made}]"
    with pytest.raises(ConfigError, match="could not determine a constructor"):
        if how == "file":
            config.convert(file(f"model: {evil}\n"), [])
        else:
            config.convert(file(TRAINED[0]), [f"run.job_name={evil}"])
    assert not made.exists()


def test_no_value_becomes_code_of_the_config(file, tmp_path):
    made = tmp_path / "made"
    evil = f'"""\n\r\u2028\x0c\nimport os; os.mkdir("{made}")\n"""'
    values = stage_2(VICUNA)
    values["model"] |= {"end_sym": evil, "ckpt": evil, "llama_model": evil}
    values["datasets"]["cc_sbu_align"]["build_info"] = {"storage": evil}
    values["run"]["train_splits"] = [{evil: evil}]
    values["run"]["job_name"] = evil
    run_config.check(loaded(config.convert(file(values), []), tmp_path))
    assert not made.exists()


def test_the_command_prints_a_config_laid_out_by_ruff(file):
    command = [sys.executable, "-m", "convert", "config"]
    options = ["--options", "run.seed=7", "run.max_epoch=2", "run.seed=8"]
    result = subprocess.run(
        [*command, str(file(TRAINED[1])), *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert "cfg.seed = 8\n" in result.stdout
    assert "total_steps=400,  # run" in result.stdout
    assert "2 of the values: not expressible yet; the header lists" in result.stderr
    ruff = [sys.executable, "-m", "ruff", "format", "--check", "-"]
    formatted = subprocess.run(ruff, input=result.stdout, text=True, timeout=60)
    assert formatted.returncode == 0


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ([], "wants one FILE.yaml, got none"),
        (["a.yaml", "b.yaml"], "got a.yaml b.yaml"),
        (["a.yaml", "--options=a.b=1", "--options", "a.b=2", "a.c=3"], "after one"),
        (["absent.yaml"], "cannot read absent.yaml: No such file"),
    ],
)
def test_a_wrong_call_is_refused(arguments, complaint):
    if "options" not in flags.FLAGS:
        config.define_flags()
    with flagsaver.flagsaver():
        rest = flags.FLAGS(["convert", *arguments])
        with pytest.raises(InputError, match=complaint):
            config.main(rest)
