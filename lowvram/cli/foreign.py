"""Flags of the authors' script and of other tools that people paste: translated where they mean the same, answered with
what stands for them where they do not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

ALIASES: Mapping[str, str] = {
    "--ckpt_dir": "--model",
    "--frame_num": "--frames",
    "--num_frames": "--frames",
    "--video_length": "--frames",
    "--sample_steps": "--steps",
    "--num_inference_steps": "--steps",
    "--infer_steps": "--steps",
    "--sample_solver": "--solver",
    "--sample_shift": "--shift",
    "--flow_shift": "--shift",
    "--sample_guide_scale": "--guidance",
    "--base_seed": "--seed",
    "--save_file": "--output",
    "--negative_prompt": "--negative",
    "--n_prompt": "--negative",
    "--refert_num": "--carry",
}
"""The same thing under another name."""

_PLANNED = "leave it out and give --vram and --ram: the plan places everything"
_ONE_GPU = "leave it out: lowvram runs on one GPU"
_NO_REWRITE = "leave it out and write the longer prompt: lowvram does not rewrite prompts"
_SIZE = "use --size WIDTHxHEIGHT"
_BUDGET = "use --vram for what the whole job may take, such as --vram 12GB"
ANSWERS: Mapping[str, str] = {
    "--task": "name the model instead: --model wan2.2-t2v-a14b (`lowvram models list` shows the names)",
    "--offload_model": _PLANNED,
    "--t5_cpu": _PLANNED,
    "--t5_fsdp": _ONE_GPU,
    "--dit_fsdp": _ONE_GPU,
    "--ulysses_size": _ONE_GPU,
    "--ring_size": _ONE_GPU,
    "--src_root_path": "name the folder itself: lowvram animate FOLDER",
    "--replace_flag": "use --mode replace",
    "--use_relighting_lora": "use --lora FILE with the relighting LoRA",
    "--convert_model_dtype": "leave it out: weights are used in the encoding they are stored in",
    "--use_prompt_extend": _NO_REWRITE,
    "--prompt_extend_method": _NO_REWRITE,
    "--prompt_extend_model": _NO_REWRITE,
    "--prompt_extend_target_lang": _NO_REWRITE,
    "--lowvram": _PLANNED,
    "--novram": _PLANNED,
    "--highvram": _PLANNED,
    "--blocks_to_swap": _PLANNED,
    "--profile": _PLANNED,
    "--max-vram": _BUDGET,
    "--vram_limit": _BUDGET,
    "--reserve-vram": _BUDGET,
    "--guidance_scale": "use --guidance HIGH[,LOW]: other tools disagree on which expert comes first",
    "--guidance_scale_2": "use --guidance HIGH,LOW",
    "--cfg": "use --guidance HIGH[,LOW]",
    "--width": _SIZE,
    "--height": _SIZE,
    "--video_size": _SIZE,
    "--resolution": _SIZE,
    "--sampler": "use --solver unipc, dpm++, euler or renoise",
    "--dit": "use --high FILE and --low FILE, or --transformer FILE",
    "--dit_high_noise": "use --high FILE",
    "--lora_weight": "use --lora FILE[:high|:low][@STRENGTH]",
    "--lora_multiplier": "use --lora FILE@STRENGTH",
    "--timestep_boundary": "leave it out: the model's own boundary is used, or that of --preset",
}
"""What to do instead, by flag."""


OWN_PROMPT = ("animate",)
"""Verbs that have a --prompt of their own."""


def translate(arguments: Sequence[str]) -> list[str]:
    """Arguments with the flags of other tools as our own. `--prompt TEXT` becomes the plain TEXT it is for most verbs."""
    translated: list[str] = []
    plain = arguments[:1] and arguments[0] not in OWN_PROMPT
    for place, argument in enumerate(arguments):
        if argument == "--":
            return translated + list(arguments[place:])
        name, equals, value = argument.partition("=")
        if name == "--prompt" and plain:
            translated += [value] if equals else []
        else:
            translated.append(ALIASES.get(name, name) + equals + value)
    return translated
