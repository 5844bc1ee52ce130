"""Distillation: consistent models have no loss, steps are DDIM's, losses fall, results draw in few steps."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tests.cli.helpers import Command, assert_one_line
from torch import Tensor, nn

from kandinsky22 import (
    DDIMScheduler,
    DDPMScheduler,
    KandinskyV22CombinedPipeline,
    KandinskyV22Pipeline,
    KandinskyV22PriorPipeline,
    LCMScheduler,
)
from kandinsky22.adapters.files import distilled_steps
from kandinsky22.errors import InputError
from kandinsky22.training.finetuning.batches import Draw
from kandinsky22.training.finetuning.consistency import ConsistencyObjective, Distillation, Solver
from kandinsky22.training.finetuning.distill import Distiller, distill
from kandinsky22.training.finetuning.generated import read_prompts
from kandinsky22.training.finetuning.objectives import Batch, DenoisingObjective
from kandinsky22.training.finetuning.optimizer import new_accelerator
from kandinsky22.training.finetuning.options import DistillOptions
from kandinsky22.training.finetuning.preparation import Entry
from kandinsky22.training.finetuning.run import Stage, TrainingRun
from kandinsky22.training.finetuning.stages import Training

KINDS = ("epsilon", "v_prediction", "sample")
BETAS: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "linear", "clip_sample": False}


def ignore(line: str) -> None:
    """Receive a line."""


# A teacher whose trajectories are known: data with mean m and variance v, thus a linear network.


def gaussian_prediction(kind: str, mean: Tensor, variance: float, sample: Tensor, alpha_bar: Tensor) -> Tensor:
    """The best prediction of the clean sample, the noise or the velocity."""
    total = alpha_bar * variance + 1 - alpha_bar
    epsilon = (1 - alpha_bar).sqrt() * (sample - alpha_bar.sqrt() * mean) / total
    x0 = (sample - (1 - alpha_bar).sqrt() * epsilon) / alpha_bar.sqrt()
    return {"epsilon": epsilon, "sample": x0, "v_prediction": alpha_bar.sqrt() * epsilon - (1 - alpha_bar).sqrt() * x0}[
        kind
    ]


class Gaussian(nn.Module):
    """Ideal network for normally distributed data whose mean is the condition."""

    def __init__(self, scheduler: Any, variance: float) -> None:
        super().__init__()
        self.scheduler, self.variance = scheduler, variance

    def forward(self, noisy: Tensor, timesteps: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        alpha_bar = self.scheduler.alphas_cumprod[timesteps].double()[:, None]
        kind = self.scheduler.config.prediction_type
        return gaussian_prediction(kind, condition["mean"], self.variance, noisy, alpha_bar)


class Jump(nn.Module):
    """Network whose consistency function is the end of the trajectory of DDIM with a `Gaussian` teacher."""

    def __init__(self, teacher: Gaussian, solver: Solver, scale: float, offset: float = 0.0) -> None:
        super().__init__()
        self.teacher, self.solver, self.scale, self.offset = teacher, solver, scale, offset
        self.weight = nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def forward(self, noisy: Tensor, timesteps: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        rows = []
        for row, t in enumerate(timesteps.tolist()):
            end, mean = noisy[row : row + 1], self.scale * condition["mean"][row : row + 1]
            for step in self.solver.timesteps.flip(0):
                if step <= t:
                    output = self.teacher(end, step[None], {"mean": mean})
                    end = self.solver.step(output, end, step[None])
            # solve c_skip x + c_out x0 = end for x0, then express x0 as a prediction
            scaled = 10.0 * t
            skip, out = 0.25 / (scaled**2 + 0.25), scaled / (scaled**2 + 0.25) ** 0.5
            x0 = (end - skip * noisy[row : row + 1]) / max(out, 1e-9) + self.offset + self.weight
            alpha_bar = self.teacher.scheduler.alphas_cumprod[t].double()
            epsilon = (noisy[row : row + 1] - alpha_bar.sqrt() * x0) / (1 - alpha_bar).sqrt()
            velocity = alpha_bar.sqrt() * epsilon - (1 - alpha_bar).sqrt() * x0
            kind = self.teacher.scheduler.config.prediction_type
            rows.append({"epsilon": epsilon, "sample": x0, "v_prediction": velocity}[kind])
        return torch.cat(rows)


class Normal(DenoisingObjective):
    """Examples of normally distributed data."""

    def __init__(self, scheduler: Any) -> None:
        self.scheduler, self.device, self.seed = scheduler, "cpu", 0
        self.entries = self.held_out = [Entry(str(index), Path(), (0, 0), 1) for index in range(2)]

    def batch(self, draws: Sequence[Draw], entries: Sequence[Entry], *, training: bool) -> Batch:
        rows = [torch.randn(3, 4, generator=draw.generators()[1], dtype=torch.float64) for draw in draws]
        mean, clean, noise = torch.stack(rows).unbind(1)
        timesteps = torch.tensor([int(draw.generators()[0].integers(1000)) for draw in draws])
        return Batch(mean + 0.5 * clean, noise, timesteps, {"mean": mean})

    def predict(
        self, network: Callable[..., Any], noisy: Tensor, timesteps: Tensor, condition: Mapping[str, Tensor]
    ) -> Tensor:
        output: Tensor = network(noisy, timesteps, condition)
        return output

    def unconditional(self, condition: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {"mean": torch.zeros_like(condition["mean"])}


def analytic(kind: str, guidance: tuple[float, float], offset: float = 0.0) -> tuple[ConsistencyObjective, Jump]:
    scheduler = DDPMScheduler(**BETAS, prediction_type=kind)
    teacher = Gaussian(scheduler, 0.25)
    settings = Distillation(guidance, num_ddim_timesteps=10)
    # Guidance of two linear networks is the network of the scaled mean.
    student = Jump(teacher, Solver(scheduler, 10), guidance[0], offset)
    return ConsistencyObjective(Normal(scheduler), student, teacher, settings), student


DRAWS = [Draw(0, (3, number)) for number in range(24)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_a_consistent_model_has_no_loss(kind: str, scale: float) -> None:
    objective, student = analytic(kind, (scale, scale))
    loss = objective.losses(student, DRAWS)["loss"].detach()
    # The scheduler's coefficients are float32, and the prediction of pure noise is divided by 0.04.
    assert float(loss) < 2e-5
    assert objective.validation_losses(student)["distance"] < 1e-8
    other, inconsistent = analytic(kind, (scale, scale), offset=0.3)
    student_loss = float(other.losses(inconsistent, DRAWS)["loss"].detach())
    # The end of a trajectory is fixed, so that only the examples of the last step are off.
    ends = other.solver.ends(other.solver.starts(other.task.batch(DRAWS, other.entries, training=True).timesteps))
    assert student_loss == pytest.approx(0.3 * float((ends < 0).double().mean()), rel=0.02)
    assert other.validation_losses(inconsistent)["distance"] == pytest.approx(0.09, rel=0.01)


def test_another_guidance_scale_is_a_loss() -> None:
    objective, _ = analytic("epsilon", (3.0, 3.0))
    _, unguided = analytic("epsilon", (1.0, 1.0))
    assert float(objective.losses(unguided, DRAWS)["loss"].detach()) > 0.01


def test_scales_are_drawn_from_the_range() -> None:
    objective, _ = analytic("epsilon", (2.0, 5.0))
    scales = objective._scales([Draw(0, (3, number)) for number in range(400)])
    assert 2 <= scales.min() < 2.1
    assert 4.9 < scales.max() <= 5
    assert abs(float(scales.mean()) - 3.5) < 0.15
    assert torch.equal(scales[:24], objective._scales(DRAWS))


def test_the_target_computes_with_the_saved_weights() -> None:
    objective, student = analytic("v_prediction", (1.0, 1.0))
    starts = objective.solver.starts(objective.task.batch(DRAWS, objective.entries, training=True).timesteps)
    inner = [draw for draw, start in zip(DRAWS, starts.tolist(), strict=True) if start > objective.solver.timesteps[0]]
    student.weight.data.fill_(0.3)
    assert float(objective.losses(student, inner)["loss"].detach()) < 2e-5  # both ends are off by the same
    objective.follow(lambda: {"weight": torch.zeros(1, dtype=torch.float64)})
    loss = objective.losses(student, inner)["loss"]
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0.3, rel=0.02)
    assert float(student.weight.grad or 0) == pytest.approx(1.0, rel=0.02)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("steps", [10, 50])
def test_a_step_of_the_solver_is_one_of_ddim(kind: str, steps: int) -> None:
    """Against equation 12 of https://arxiv.org/abs/2010.02502 and a whole generation with the scheduler."""
    schedule = DDPMScheduler(**BETAS, prediction_type=kind, thresholding=False)
    solver = Solver(schedule, steps)
    stride = 1000 // steps
    assert solver.timesteps.tolist() == [stride * number - 1 for number in range(1, steps + 1)]
    assert solver.starts(torch.tensor([0, stride - 1, stride, 999])).tolist() == [
        *(stride - 1, stride - 1, 2 * stride - 1, 999)
    ]
    timesteps = solver.timesteps[[0, 1, steps // 2, steps - 1]]
    ends = solver.ends(timesteps)
    assert ends.tolist() == [t - stride for t in timesteps.tolist()]
    torch.manual_seed(0)
    output, sample = torch.randn(2, 4, 4, 5, 5, dtype=torch.float64)
    after = solver.step(output, sample, timesteps)
    for row, (t, end) in enumerate(zip(timesteps.tolist(), ends.tolist(), strict=True)):
        alpha_bar = schedule.alphas_cumprod[t].double()
        before = schedule.alphas_cumprod[end].double() if end >= 0 else torch.tensor(1.0).double()
        root, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        x0 = {
            "epsilon": (sample[row] - noise * output[row]) / root,
            "sample": output[row],
            "v_prediction": root * sample[row] - noise * output[row],
        }[kind]
        expected = before.sqrt() * x0 + (1 - before).sqrt() * (sample[row] - root * x0) / noise
        torch.testing.assert_close(after[row], expected, rtol=1e-4, atol=1e-5)
    ddim = DDIMScheduler.from_config(schedule.config, timestep_spacing="trailing")
    ddim.set_timesteps(steps)
    assert ddim.timesteps.tolist() == solver.timesteps.flip(0).tolist()
    ours = theirs = sample
    for t in ddim.timesteps:
        theirs = ddim.step(0.3 * theirs, t, theirs, return_dict=False)[0]
        ours = solver.step(0.3 * ours, ours, t.expand(4))
    assert torch.equal(ours, theirs)


def test_predictions_are_those_of_the_sampler() -> None:
    schedule = DDPMScheduler(**{**BETAS, "clip_sample": True}, prediction_type="epsilon")
    solver = Solver(schedule, 50)
    lcm = LCMScheduler.from_config(schedule.config)
    lcm.set_timesteps(4)
    torch.manual_seed(0)
    output, sample = torch.randn(1, 8, 3, 3), torch.randn(1, 4, 3, 3)
    for t in lcm.timesteps:
        clean = lcm.step(output, t, sample, generator=torch.Generator().manual_seed(0)).pred_original_sample
        assert torch.equal(clean, solver.clean(output, sample, t[None], bounded=True))
    assert torch.equal(solver.clean(output, sample, torch.tensor([-20]), bounded=True), sample)
    assert torch.equal(solver.clean(output, sample, torch.tensor([0]), bounded=True), sample)
    assert solver.clean(output, sample, lcm.timesteps[:1], bounded=False).abs().max() > 2


# Tiny networks


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.txt"
    path.write_text("a cat\n\n  a red thing \na cat\na dog on a hill\n")
    return path


@pytest.fixture
def distilled(options: Any) -> Any:
    """Function that returns options of short distillations."""

    def make(**changes: Any) -> DistillOptions:
        few: dict[str, Any] = {"num_ddim_timesteps": 10, **changes}
        if "prompts" in few:
            few["train_data_dir"] = None
        if few.get("full"):
            few["rank"] = 64  # the default
        result: DistillOptions = options(DistillOptions, **few)
        return result

    return make


def run_of(options: DistillOptions, name: str) -> tuple[TrainingRun, Stage]:
    training = Training(options, new_accelerator(options), ignore)
    stage = Distiller(training, options).stage(name)
    return TrainingRun(stage, options, training.folder / name, training.accelerator, ignore), stage


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "decoder": ("decoder", {"learning_rate": 0.03, "ema_decay": 0.5}),
    "prior, full": ("prior", {"learning_rate": 0.001, "full": True, "use_ema": False}),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_training_brings_one_step_closer_to_the_teacher(case: str, distilled: Any, model: Path, tmp_path: Path) -> None:
    name, changes = CASES[case]
    copy = tmp_path / "velocity"
    shutil.copytree(model, copy)
    # The noise that a random network predicts is far from pure noise, and says nothing about the clean sample.
    config = copy / "scheduler" / "scheduler_config.json"
    velocity = {"prediction_type": "v_prediction", "clip_sample": False}
    config.write_text(json.dumps({**json.loads(config.read_text()), **velocity}))
    few = {"num_ddim_timesteps": 4, "validation_images": 2, "train_batch_size": 4, "huber_c": 0.1}
    run, stage = run_of(distilled(model=str(copy), **few, **changes), name)
    objective = stage.streams[0].objective
    with run.results_in_network():
        before = objective.validation_losses(run.network)
    for _ in range(20):
        run.advance()
    with run.results_in_network():
        after = objective.validation_losses(run.network)
    assert after["distance"] < 0.8 * before["distance"], (before, after)


@pytest.mark.slow
@pytest.mark.parametrize("folder", ["inpaint", "control/decoder"])
def test_other_decoders_are_distilled(folder: str, distilled: Any, models: Path) -> None:
    hints = {"hint_type": "edges"} if folder == "control/decoder" else {}
    run, stage = run_of(distilled(model=str(models / folder), learning_rate=0.02, **hints), "decoder")
    objective = stage.streams[0].objective
    with run.results_in_network():
        before = objective.validation_losses(run.network)
    for _ in range(6):
        run.advance()
    with run.results_in_network():
        assert objective.validation_losses(run.network)["loss"] < 0.97 * before["loss"]


@pytest.mark.parametrize("full", [False, True])
def test_the_teacher_stays_as_it_was(full: bool, distilled: Any, model: Path) -> None:
    run, stage = run_of(distilled(learning_rate=0.01, full=full), "decoder")
    objective = stage.streams[0].objective
    assert isinstance(objective, ConsistencyObjective)
    batch = objective.task.batch([Draw(0, (1,))], objective.entries, training=False)
    unet = KandinskyV22Pipeline.from_pretrained(model, movq=None).unet
    run.advance()
    with torch.no_grad():
        expected, teacher, student = (
            objective.task.predict(network, batch.noise, torch.tensor([999]), batch.condition)
            for network in (unet, objective.teacher, run.network)
        )
    assert torch.equal(teacher, expected)
    assert not torch.equal(student, expected)
    assert objective.settings.guidance == (2.0, 2.0)  # the model's own


def test_both_factors_have_gradients_under_autocast(distilled: Any) -> None:
    """Weights that are cast while no gradient is needed must not be used again where one is."""
    run, stage = run_of(distilled(learning_rate=0.01), "decoder")
    run.advance()
    with torch.autocast("cpu", torch.bfloat16):
        stage.streams[0].objective.losses(run.network, [Draw(0, (1,)), Draw(1, (2,))])["loss"].backward()
    without = [name for name, value in run.parameters.items() if value.grad is None or not value.grad.any()]
    assert not without


@pytest.mark.slow
@pytest.mark.parametrize(("full", "stage"), [(False, "decoder"), (True, "prior")])
def test_a_resumed_distillation_equals_an_uninterrupted_one(
    stage: str, full: bool, distilled: Any, tmp_path: Path
) -> None:
    changes = {"stage": stage, "full": full, "guidance_scale": 1.5, "guidance_scale_max": 4.0, "validation_steps": 3}
    whole = distill(distilled(**changes))[0]
    parts = distilled(**changes, output_dir=str(tmp_path / "parts"))
    run, _ = run_of(parts, stage)
    for _ in range(2):
        run.advance()
    run.save()
    run.advance()  # lost
    resumed = distill(dataclasses.replace(parts, resume="latest"))[0]
    role = "unet" if stage == "decoder" else "prior"
    file = f"{role}/diffusion_pytorch_model.safetensors" if full else ""
    ours, theirs = load_file(whole / file), load_file(resumed / file)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[name]) for name, value in ours.items())
    with pytest.raises(InputError, match=r"--num-ddim-timesteps was 10 and is 20"):
        distill(dataclasses.replace(parts, resume="latest", num_ddim_timesteps=20))


@pytest.mark.slow
def test_an_adapter_from_prompts_draws_in_two_steps(distilled: Any, prompts: Path, model: Path) -> None:
    options = distilled(
        prompts=str(prompts),
        stage="both",
        num_images_per_prompt=2,
        validation_prompt=("a cat",),
        learning_rate=0.01,
        num_ddim_timesteps=50,
        num_inference_steps=2,
    )
    (path,) = distill(options)
    assert Image.open(path.parent / "decoder" / "samples-000004.png").size == (32, 32)
    assert Image.open(path.parent / "prior" / "samples-000004.png").size == (32, 32)
    line = json.loads((path.parent / "decoder" / "log.jsonl").read_text().splitlines()[-1])
    assert line["validation_distance"] > 0
    assert any(".conv1.lora_A" in name for name in load_file(path))
    assert distilled_steps(path) == 2
    pipe = KandinskyV22CombinedPipeline.from_pretrained(model)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = LCMScheduler.from_config(pipe.scheduler.config)
    pipe.prior_scheduler = LCMScheduler.from_config(pipe.prior_scheduler.config)
    few: dict[str, Any] = {"num_inference_steps": 2, "guidance_scale": 1.0}
    few |= {f"prior_{name}": value for name, value in few.items()}

    def draw() -> Tensor:
        return pipe("a cat", **few, output_type="pt", generator=torch.Generator().manual_seed(0)).images

    plain = draw()
    pipe.load_lora_weights(str(path))
    assert (draw() - plain).abs().max() > 1e-3


def test_the_adapter_file_computes_as_the_trained_network(distilled: Any, model: Path) -> None:
    run, stage = run_of(distilled(learning_rate=0.02, lora_alpha=3.0), "decoder")
    run.advance()
    run.advance()
    stage.write_results(run.folder, dict(run.parameters))
    pipe = KandinskyV22Pipeline.from_pretrained(model, movq=None)
    sample, embeds = torch.randn(1, 4, 8, 8), {"image_embeds": torch.randn(1, pipe.unet.config.encoder_hid_dim)}
    with torch.no_grad():
        before = pipe.unet(sample, 500, added_cond_kwargs=embeds).sample
        pipe.load_lora_weights(str(run.folder))
        ours, loaded = (net(sample, 500, added_cond_kwargs=embeds).sample for net in (run.network, pipe.unet))
    torch.testing.assert_close(ours, loaded, rtol=1e-4, atol=1e-4)
    assert (loaded - before).abs().max() > 1e-2


@pytest.mark.slow
def test_the_model_draws_its_own_pictures(distilled: Any, prompts: Path) -> None:
    lines: list[str] = []
    options = distilled(prompts=str(prompts), num_images_per_prompt=2, validation_images=0, max_train_samples=2)
    training = Training(options, new_accelerator(options), lines.append)
    stage = Distiller(training, options).stage("decoder")
    entries = stage.streams[0].objective.entries  # type: ignore[attr-defined]
    assert [entry.caption for entry in entries] == ["a cat", "a cat", "a red thing", "a red thing"]
    latents = torch.cat([training.store[entry.path]["latents"] for entry in entries])
    assert latents.shape == (4, 4, 16, 16)
    assert len({tuple(row.flatten().tolist()) for row in latents}) == 4
    assert "draws 4 pictures" in lines
    lines.clear()
    Distiller(training, options).stage("decoder")
    assert not any("draws" in line for line in lines)
    other = dataclasses.replace(options, guidance_scale=5.0)
    Distiller(Training(other, training.accelerator, lines.append), other).stage("decoder")
    assert "draws 4 pictures" in lines


def test_prompts_end_where_lines_end(distilled: Any, tmp_path: Path) -> None:
    path = tmp_path / "lines.txt"
    path.write_bytes("a\u2028cat\r\na\x85dog\n\na\x0bfox\rred\n".encode())
    samples = read_prompts(distilled(prompts=str(path)))
    assert [sample.prompt for sample in samples] == ["a\u2028cat", "a\x85dog", "a\x0bfox", "red"]


@pytest.mark.slow
def test_full_distillation_writes_pipelines_for_few_steps(distilled: Any, prompts: Path) -> None:
    options = distilled(prompts=str(prompts), stage="both", full=True, num_inference_steps=2)
    prior, decoder = distill(options)
    for pipe in (KandinskyV22PriorPipeline.from_pretrained(prior), KandinskyV22Pipeline.from_pretrained(decoder)):
        assert isinstance(pipe.scheduler, LCMScheduler)
        assert pipe.scheduler.config.original_inference_steps == 10
        assert pipe.generation_defaults == {"num_inference_steps": 2, "guidance_scale": 1.0}
    combined = KandinskyV22CombinedPipeline.from_pretrained(decoder)
    combined.set_progress_bar_config(disable=True)
    assert combined("a cat", **combined.generation_defaults).images[0].size == (32, 32)


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        ((), 1, ("none of --train-data-dir, --dataset-name, --prompts set",)),
        (("--prompts", "p.txt", "--train-data-dir", "x"), 1, ("--train-data-dir and --prompts", "exactly one")),
        (("--prompts", "missing.txt"), 1, ("--prompts missing.txt cannot be read: No such file",)),
        (("--prompts", "empty.txt"), 1, ("--prompts empty.txt holds no prompts",)),
        (("--prompts", "binary.txt"), 1, ("--prompts binary.txt is not text in UTF-8",)),
        (("--prompts", "p.txt", "--random-flip"), 1, ("--random-flip has no effect with --prompts",)),
        (("--train-data-dir", "x", "--num-images-per-prompt", "2"), 1, ("no effect without --prompts",)),
        (("--prompts", "p.txt", "--full", "--rank", "8"), 1, ("--rank has no effect with --full",)),
        (("--prompts", "p.txt", "--rank", "4000"), 1, ("--rank=4000", "at most")),
        (("--prompts", "p.txt", "--guidance-scale", "0.5"), 2, ("--guidance-scale", "at least 1")),
        (("--prompts", "p.txt", "--guidance-scale-max", "5"), 1, ("--guidance-scale-max=5.0", "None without")),
        (
            ("--prompts", "p.txt", "--guidance-scale", "5", "--guidance-scale-max", "3"),
            *(1, ("--guidance-scale-max=3.0", "at least --guidance-scale=5")),
        ),
        (("--prompts", "p.txt", "--num-ddim-timesteps", "1001"), 2, ("--num-ddim-timesteps", "at most 1000")),
        (("--prompts", "p.txt", "--num-inference-steps", "60"), 1, ("at most --num-ddim-timesteps=50",)),
        (("--prompts", "p.txt", "--huber-c", "0"), 2, ("--huber-c", "above 0")),
        (("--prompts", "p.txt", "--snr-gamma", "5"), 2, ("--snr-gamma",)),
    ],
)
def test_bad_input_is_one_line(
    arguments: tuple[str, ...], code: int, words: tuple[str, ...], command: Command, model: Path
) -> None:
    Path("p.txt").write_text("a cat")
    Path("empty.txt").write_text("\n  \n")
    Path("binary.txt").write_bytes(b"\xff\xfe\x80")
    assert_one_line(command("train", "distill", "--model", model, "-q", *arguments), code, *words)


def test_other_decoders_need_pictures(distilled: Any, prompts: Path, models: Path) -> None:
    options = distilled(prompts=str(prompts), model=str(models / "inpaint"))
    with pytest.raises(InputError, match=r"None for a decoder of the kind inpaint; name pictures"):
        distill(options)
    with pytest.raises(InputError, match="--snr-gamma has no effect in distillation"):
        distilled(snr_gamma=5.0)


@pytest.mark.slow
def test_the_command_distils(command: Command, model: Path, prompts: Path) -> None:
    arguments = ("--model", model, "--prompts", prompts, "--max-train-steps", 1, "--rank", 2, "-q")
    result = command("train", "distill", *arguments, "--num-ddim-timesteps", 10, "--validation-images", 0)
    assert (result.code, result.err) == (0, "")
    assert result.paths == [Path("kandinsky22-distilled/pytorch_lora_weights.safetensors")]
    few = ("--scheduler", "lcm", "--steps", 2, "--guidance", 1, "--lora", result.paths[0], "-o", "cat.png")
    drawn = command("generate", "a cat", "--model", model, *few)
    assert drawn.code == 0, drawn.err
