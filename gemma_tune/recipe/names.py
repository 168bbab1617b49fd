"""Names: what the keys of a recipe are called elsewhere, which trainer keywords the recipe owns, and did-you-mean."""

from __future__ import annotations

from collections.abc import Iterable

ELSEWHERE: dict[str, tuple[str, str]] = {
    # Hugging Face transformers, TRL, PEFT and bitsandbytes
    "per_device_train_batch_size": ("batch.micro", "batch.size is the global batch"),
    "per_device_eval_batch_size": ("batch.micro", "evaluation uses the same"),
    "per_gpu_train_batch_size": ("batch.micro", "batch.size is the global batch"),
    "train_batch_size": ("batch.size", "it is the global batch"),
    "global_batch_size": ("batch.size", ""),
    "batch_size": ("batch.size", "it is the global batch"),
    "micro_batch_size": ("batch.micro", ""),
    "auto_find_batch_size": ("batch.micro", "write `auto`"),
    "gradient_accumulation_steps": ("batch.size", "accumulation is derived from the global batch"),
    "num_train_epochs": ("optim.epochs", ""),
    "num_epochs": ("optim.epochs", ""),
    "max_train_steps": ("optim.max_steps", ""),
    "lr": ("optim.learning_rate", ""),
    "lr_scheduler_type": ("optim.schedule", ""),
    "lr_scheduler": ("optim.schedule", ""),
    "lr_scheduler_kwargs": ("optim.schedule", ""),
    "scheduler": ("optim.schedule", ""),
    "warmup_steps": ("optim.warmup_ratio", "a share of the steps"),
    "adam_beta1": ("optim.beta1", ""),
    "adam_beta2": ("optim.beta2", ""),
    "adam_epsilon": ("optim.epsilon", ""),
    "optim_args": ("optim.optimizer", ""),
    "gradient_clipping": ("optim.max_grad_norm", ""),
    "max_seq_length": ("data.max_length", ""),
    "max_seq_len": ("data.max_length", ""),
    "model_max_length": ("data.max_length", ""),
    "sequence_len": ("data.max_length", ""),
    "seq_length": ("data.max_length", ""),
    "block_size": ("data.max_length", ""),
    "cutoff_len": ("data.max_length", ""),
    "sample_packing": ("data.packing", ""),
    "packing_strategy": ("data.packing", ""),
    "padding_free": ("data.packing", ""),
    "assistant_only_loss": ("data.train_on", "`model_turns` is the default"),
    "completion_only_loss": ("data.train_on", "`model_turns` is the default"),
    "train_on_inputs": ("data.train_on", "`all` trains every token"),
    "train_on_prompt": ("data.train_on", "`all` trains every token"),
    "mask_prompt": ("data.train_on", "`model_turns` is the default"),
    "dataset_name": ("data.sources", "a list: `sources: [{name: ...}]`"),
    "dataset_path": ("data.sources", "a list: `sources: [{name: ...}]`"),
    "data_path": ("data.sources", "a list: `sources: [{name: ...}]`"),
    "data_files": ("data.sources", "a list: `sources: [{name: ...}]`"),
    "train_file": ("data.sources", "a list: `sources: [{name: ...}]`"),
    "dataset": ("data.sources", "a list: `sources: [{name: ...}]`"),
    "datasets": ("data.sources", "a list: `sources: [{name: ...}]`"),
    "dataset_text_field": ("data.sources.0.columns", "`columns: {text: ...}`"),
    "dataset_config": ("data.sources.0.subset", ""),
    "dataset_config_name": ("data.sources.0.subset", ""),
    "dataset_split": ("data.sources.0.split", ""),
    "dataset_train_split": ("data.sources.0.split", ""),
    "dataset_streaming": ("data.streaming", ""),
    "dataset_num_proc": ("data.workers", ""),
    "preprocessing_num_workers": ("data.workers", ""),
    "num_proc": ("data.workers", ""),
    "max_samples": ("data.sources.0.limit", ""),
    "max_train_samples": ("data.sources.0.limit", ""),
    "test_size": ("data.holdout", ""),
    "val_set_size": ("data.holdout", ""),
    "val_size": ("data.holdout", ""),
    "validation_split": ("data.holdout", ""),
    "eval_split_ratio": ("data.holdout", ""),
    "model_name_or_path": ("model.name", ""),
    "pretrained_model_name_or_path": ("model.name", ""),
    "model_name": ("model.name", ""),
    "model_id": ("model.name", ""),
    "base_model": ("model.name", ""),
    "model_revision": ("model.revision", ""),
    "tokenizer_name": ("model.tokenizer", ""),
    "tokenizer_name_or_path": ("model.tokenizer", ""),
    "load_in_4bit": ("model.quantization", "`nf4` is 4-bit and the default"),
    "use_4bit": ("model.quantization", "`nf4` is 4-bit and the default"),
    "load_in_8bit": ("model.quantization", "write `int8`"),
    "quantization_bit": ("model.quantization", "`nf4` is 4-bit, `int8` is 8-bit"),
    "quantization_config": ("model.quantization", ""),
    "bnb_4bit_quant_type": ("model.quantization", ""),
    "bnb_4bit_use_double_quant": ("model.double_quantization", ""),
    "use_bnb_nested_quant": ("model.double_quantization", ""),
    "use_nested_quant": ("model.double_quantization", ""),
    "bnb_4bit_compute_dtype": ("model.precision", ""),
    "torch_dtype": ("model.precision", ""),
    "dtype": ("model.precision", ""),
    "bf16": ("model.precision", "write `bf16`"),
    "fp16": ("model.precision", "write `fp16`"),
    "mixed_precision": ("model.precision", ""),
    "attn_implementation": ("model.attention", ""),
    "use_flash_attention_2": ("model.attention", "write `flash_attention_2`"),
    "use_flash_attn": ("model.attention", "write `flash_attention_2`"),
    "flash_attention": ("model.attention", "write `flash_attention_2`"),
    "flash_attn": ("model.attention", "write `flash_attention_2`"),
    "use_peft": ("adapter", "LoRA is the default; `adapter: null` trains all weights"),
    "peft_config": ("adapter", ""),
    "lora_r": ("adapter.r", ""),
    "lora_rank": ("adapter.r", ""),
    "rank": ("adapter.r", ""),
    "lora_alpha": ("adapter.alpha", ""),
    "lora_dropout": ("adapter.dropout", ""),
    "lora_target": ("adapter.targets", "`all-linear`, `attention` or `mlp`"),
    "lora_target_modules": ("adapter.targets", "`all-linear`, `attention` or `mlp`"),
    "lora_target_linear": ("adapter.targets", "`all-linear` is the default"),
    "target_modules": ("adapter.targets", "`all-linear`, `attention` or `mlp`"),
    "use_rslora": ("adapter.rslora", ""),
    "use_dora": ("adapter.dora", ""),
    "use_gradient_checkpointing": ("memory.gradient_checkpointing", ""),
    "gradient_checkpointing_kwargs": ("memory.gradient_checkpointing", ""),
    "activation_checkpointing": ("memory.gradient_checkpointing", ""),
    "eval_steps": ("evaluation.every", ""),
    "eval_strategy": ("evaluation.every", "a number of steps"),
    "evaluation_strategy": ("evaluation.every", "a number of steps"),
    "do_eval": ("evaluation.every", "it always runs where there are held-out rows"),
    "max_eval_samples": ("evaluation.max_rows", ""),
    "save_steps": ("checkpoint.every", ""),
    "save_strategy": ("checkpoint.every", "a number of steps"),
    "save_total_limit": ("checkpoint.keep", ""),
    "logging_steps": ("tracking.log_every", ""),
    "logging_strategy": ("tracking.log_every", "a number of steps"),
    "report_to": ("tracking.wandb", "true or false"),
    "use_wandb": ("tracking.wandb", ""),
    "run_name": ("tracking.name", ""),
    "project_name": ("tracking.project", ""),
    "wandb_project": ("tracking.project", ""),
    "wandb_name": ("tracking.name", ""),
    "output_dir": ("output", ""),
    "data_seed": ("seed", "one seed for everything"),
    "random_seed": ("seed", ""),
    # Many processes: transformers, accelerate and torch
    "fsdp": ("distributed.strategy", "write `fsdp2`"),
    "fsdp_config": ("distributed", "`strategy: fsdp2`; which layers are wrapped follows from the Gemma"),
    "fsdp_version": ("distributed.strategy", "write `fsdp2`"),
    "fsdp_state_dict_type": ("distributed.checkpoint", "`full` or `sharded`"),
    "state_dict_type": ("distributed.checkpoint", "`full` or `sharded`"),
    "fsdp_offload_params": ("distributed.offload", ""),
    "offload_params": ("distributed.offload", ""),
    "cpu_offload": ("distributed.offload", ""),
    "fsdp_reshard_after_forward": ("distributed.reshard_after_forward", ""),
    "fsdp_activation_checkpointing": ("memory.gradient_checkpointing", ""),
    "parallelism_config": ("distributed.replicas", "with `strategy: hsdp`"),
    "parallelism_config_dp_replicate_size": ("distributed.replicas", "with `strategy: hsdp`"),
    "dp_replicate_size": ("distributed.replicas", "with `strategy: hsdp`"),
    "deepspeed": ("distributed.strategy", "`fsdp2` shards as ZeRO-3 does"),
    "ddp_timeout": ("distributed.timeout", "in minutes"),
    # Preferences: TRL, and what LLaMA-Factory, Axolotl and ms-swift call them
    "loss_type": ("dpo.loss", ""),
    "pref_loss": ("dpo.loss", ""),
    "pref_beta": ("dpo.beta", ""),
    "dpo_beta": ("dpo.beta", ""),
    "rl_beta": ("dpo.beta", ""),
    "dpo_label_smoothing": ("dpo.label_smoothing", ""),
    "rpo_alpha": ("dpo.sft_weight", ""),
    "pref_ftx": ("dpo.sft_weight", ""),
    "loss_weights": ("dpo.sft_weight", "the weight of the usual loss beside the preference loss"),
    "precompute_ref_log_probs": ("dpo.precompute_reference", ""),
    "precompute_ref_batch_size": ("batch.micro", "the reference takes the same"),
    "kto_chosen_weight": ("kto.desirable_weight", ""),
    "kto_rejected_weight": ("kto.undesirable_weight", ""),
    "center_rewards_coefficient": ("reward.center", ""),
    "max_prompt_length": ("data.max_length", "prompt and answer together; an answer is never cut"),
    "max_completion_length": ("data.max_length", "prompt and answer together; an answer is never cut"),
    "max_target_length": ("data.max_length", "prompt and answer together; an answer is never cut"),
    # PPO: trl's removed trainer, OpenRLHF, verl and LLaMA-Factory
    "kl_coef": ("ppo.kl", ""),
    "init_kl_coef": ("ppo.kl", ""),
    "adap_kl_ctrl": ("ppo.kl_target", "it is set where the coefficient is to be adapted"),
    "ppo_target": ("ppo.kl_target", ""),
    "horizon": ("ppo.kl_horizon", ""),
    "target_kl": ("ppo.stop_kl", ""),
    "early_stopping": ("ppo.stop_kl", ""),
    "cliprange": ("ppo.clip", ""),
    "clip_range": ("ppo.clip", ""),
    "clip_ratio": ("ppo.clip", ""),
    "eps_clip": ("ppo.clip", ""),
    "cliprange_value": ("ppo.value_clip", ""),
    "lambd": ("ppo.lam", ""),
    "gae_lambda": ("ppo.lam", ""),
    "num_ppo_epochs": ("ppo.epochs", ""),
    "ppo_epochs": ("ppo.epochs", ""),
    "max_epochs": ("ppo.epochs", "passes over the data are optim.epochs"),
    "num_iterations": ("ppo.epochs", ""),
    "num_mini_batches": ("ppo.minibatches", "a number of them, not a size"),
    "mini_batch_size": ("ppo.minibatches", "a number of them, not a size"),
    "missing_eos_penalty": ("ppo.missing_stop_penalty", ""),
    "non_eos_penalty": ("ppo.missing_stop_penalty", ""),
    "response_length": ("ppo.max_new_tokens", ""),
    "max_response_length": ("ppo.max_new_tokens", ""),
    "generate_max_len": ("ppo.max_new_tokens", ""),
    "prompt_max_len": ("data.max_length", "prompt and response together"),
    "reward_model_path": ("ppo.reward", "a run of `gemma-tune reward`, or ./mine.py:function"),
    "reward_model": ("ppo.reward", "a run of `gemma-tune reward`, or ./mine.py:function"),
    "reward_pretrain": ("ppo.reward", "a run of `gemma-tune reward`, or ./mine.py:function"),
    "reward_funcs": ("ppo.reward", "a run of `gemma-tune reward`, or ./mine.py:function"),
    "reward_function": ("ppo.reward", "./mine.py:function"),
    "remote_rm_url": ("ppo.reward", "./mine.py:function, which may ask a server"),
    "reward_weights": ("ppo.reward", "a list of {source, weight}"),
    "reward_clip_range": ("ppo.score_clip", "its upper bound"),
    "normalize_reward": ("ppo.normalize", ""),
    "ppo_score_norm": ("ppo.normalize", ""),
    "use_score_norm": ("ppo.normalize", ""),
    "use_score_scaling": ("ppo.normalize", ""),
    "ppo_whiten_rewards": ("ppo.whiten_rewards", ""),
    "advantage_estimator": ("ppo.estimator", ""),
    "adv_estimator": ("ppo.estimator", ""),
    "n_samples_per_prompt": ("ppo.samples_per_prompt", ""),
    "num_generations": ("ppo.samples_per_prompt", ""),
    "rloo_k": ("ppo.samples_per_prompt", ""),
    "entropy_coeff": ("ppo.entropy", ""),
    "entropy_coef": ("ppo.entropy", ""),
    "entropy_loss_coef": ("ppo.entropy", ""),
    "freezing_actor_steps": ("ppo.critic_warmup", ""),
    "critic_warmup_steps": ("ppo.critic_warmup", ""),
    "critic_lr": ("ppo.critic_learning_rate", ""),
    "actor_learning_rate": ("optim.learning_rate", ""),
    "sft_model_path": ("model.adapter", "the run to begin with, on the base in model.name"),
    "rollout_batch_size": ("batch.size", "responses a step"),
    "ppo_buffer_size": ("batch.size", "responses a step"),
    "total_episodes": ("optim.max_steps", "episodes divided by batch.size"),
    "num_episodes": ("optim.epochs", "passes over the prompts"),
    "num_sample_generations": ("samples.every", "a number of steps"),
    "adapter_name_or_path": ("model.adapter", "a run or adapter folder to begin with"),
    "adapter_path": ("model.adapter", "a run or adapter folder to begin with"),
    "lora_model_dir": ("model.adapter", "a run or adapter folder to begin with"),
    "rlhf_type": ("stage", "`reward`, `dpo`, `kto` or `ppo`"),
    "rl": ("stage", "`reward`, `dpo`, `kto` or `ppo`"),
    # Sections of other tools
    "lora": ("adapter", ""),
    "peft": ("adapter", ""),
    "lora_config": ("adapter", ""),
    "train": ("optim", "the recipe's sections are by topic"),
    "training": ("optim", "the recipe's sections are by topic"),
    "optimizer_config": ("optim", ""),
    "eval": ("evaluation", ""),
    "logging": ("tracking", ""),
    "checkpointing": ("checkpoint", ""),
    "method": ("stage", ""),
    "task": ("stage", ""),
}
"""A key of another tool -> our key, and a remark. A name that is a key of ours is looked up among ours first."""

NOT_IN_A_RECIPE: dict[str, str] = {
    "resume_from_checkpoint": "it belongs on the command line: --resume auto",
    "overwrite_output_dir": "a run folder is never overwritten; choose another `output`, or --resume auto",
    "trust_remote_code": "code from a model's folder is never run",
    "push_to_hub": "a run stays on this machine; upload its folder afterwards with `hf upload`",
    "hub_model_id": "a run stays on this machine; upload its folder afterwards with `hf upload`",
    "chat_template": "each Gemma generation has its official template built in",
    "ref_model": "the reference is the base, or model.adapter as it was: never a second model",
    "ref_model_name_or_path": "the reference is the base, or model.adapter as it was: never a second model",
    "reference_model": "the reference is the base, or model.adapter as it was: never a second model",
    "ref_adapter_name": "the reference is the base, or model.adapter as it was",
    "sync_ref_model": "the reference stays as it was at the start",
    "disable_dropout": "only sft has dropout",
    "kl_estimator": "the penalty in the reward is k1, always: as a reward, k3 has not the gradient of the KL; k3 is "
    "reported beside it",
    "use_kl_loss": "the KL is a penalty in the reward of each token: ppo.kl",
    "vf_coef": "the critic has parameters and a learning rate of its own: ppo.critic_learning_rate",
    "critic_pretrain": "the critic begins with the first reward model of ppo.reward, where there is one",
    "value_model": "the critic begins with the first reward model of ppo.reward, where there is one",
    "stop_token": "a response ends at every stop token of the generation",
    "stop_token_id": "a response ends at every stop token of the generation",
    "modules_to_save": "an adapter stays a plain LoRA, so that every server can load it",
}
"""A key of another tool -> why there is none here and what to do instead."""

SECRETS = frozenset(
    {"hf_token", "hub_token", "huggingface_token", "token", "auth_token", "use_auth_token", "access_token"}
    | {"api_key", "wandb_api_key", "wandb_key", "password", "secret"}
)
"""Keys whose value is a secret. They are refused by name, and the value is never printed."""

OWNED_BY_RECIPE: dict[str, str] = {
    **{
        keyword: ELSEWHERE[keyword][0]
        for keyword in (
            "per_device_train_batch_size",
            "per_device_eval_batch_size",
            "auto_find_batch_size",
            "gradient_accumulation_steps",
            "num_train_epochs",
            "lr_scheduler_type",
            "lr_scheduler_kwargs",
            "warmup_steps",
            "adam_beta1",
            "adam_beta2",
            "adam_epsilon",
            "optim_args",
            "dataset_num_proc",
            "bf16",
            "fp16",
            "gradient_checkpointing_kwargs",
            "eval_steps",
            "eval_strategy",
            "do_eval",
            "save_steps",
            "save_strategy",
            "save_total_limit",
            "logging_steps",
            "logging_strategy",
            "report_to",
            "run_name",
            "output_dir",
            "data_seed",
            "fsdp",
            "fsdp_config",
            "deepspeed",
            "parallelism_config",
            "ddp_timeout",
        )
    },
    "learning_rate": "optim.learning_rate",
    "max_steps": "optim.max_steps",
    "optim": "optim.optimizer",
    "weight_decay": "optim.weight_decay",
    "max_grad_norm": "optim.max_grad_norm",
    "max_length": "data.max_length",
    "gradient_checkpointing": "memory.gradient_checkpointing",
    "project": "tracking.project",
    "seed": "seed",
    "full_determinism": "seed",
    "bf16_full_eval": "model.precision",
    "fp16_full_eval": "model.precision",
    "model_init_kwargs": "model",
    "pad_token": "model",
    "use_cpu": "model.precision",
    "train_sampling_strategy": "data.shuffle",
    "remove_unused_columns": "data",
    "prediction_loss_only": "evaluation",
    "logging_nan_inf_filter": "evaluation",
    "load_best_model_at_end": "checkpoint",
    "save_only_model": "checkpoint",
    "resume_from_checkpoint": "--resume",
    "push_to_hub": "output",
    "disable_tqdm": "tracking",
}
"""Keywords of every trainer of ours that `advanced.trainer` may not carry -> where the recipe decides them."""

_OWNED_OF_STAGE: dict[str, dict[str, str]] = {
    "sft": {
        **{key: ELSEWHERE[key][0] for key in ("packing_strategy", "padding_free", "dataset_text_field")},
        **{key: ELSEWHERE[key][0] for key in ("assistant_only_loss", "completion_only_loss")},
        "packing": "data.packing",
        "eval_packing": "data.packing",
        "shuffle_dataset": "data.shuffle",
        "chat_template_path": "model",
        "eos_token": "model",
        "dataset_kwargs": "data",
    },
    "reward": {
        "center_rewards_coefficient": "reward.center",
        "chat_template_path": "model",
        "eos_token": "model",
    },
    "dpo": {
        **{key: ELSEWHERE[key][0] for key in ("loss_type", "loss_weights", "precompute_ref_log_probs")},
        "precompute_ref_batch_size": "batch.micro",
        "padding_free": "data",
        "beta": "dpo.beta",
        "label_smoothing": "dpo.label_smoothing",
    },
    "kto": {
        "beta": "kto.beta",
        "desirable_weight": "kto.desirable_weight",
        "undesirable_weight": "kto.undesirable_weight",
        "loss_type": "stage",
        "precompute_ref_log_probs": "stage",
        "precompute_ref_batch_size": "batch.micro",
    },
    "ppo": {
        **{key: f"ppo.{key}" for key in ("estimator", "minibatches", "samples_per_prompt")},
        **{key: f"ppo.{key}" for key in ("critic", "critic_learning_rate", "critic_warmup", "clip", "value_clip")},
        **{key: f"ppo.{key}" for key in ("gamma", "lam", "kl", "kl_target", "kl_horizon", "stop_kl", "entropy")},
        **{key: f"ppo.{key}" for key in ("missing_stop_penalty", "score_clip", "normalize", "whiten_rewards")},
        **{key: f"ppo.{key}" for key in ("max_new_tokens", "temperature", "top_k", "top_p")},
        "ppo_epochs": "ppo.epochs",
    },
}


def owned_by_recipe(stage: str) -> dict[str, str]:
    """Keywords of this stage's trainer that `advanced.trainer` may not carry -> where the recipe decides them."""
    return OWNED_BY_RECIPE | _OWNED_OF_STAGE[stage]


def owner_of(keyword: str, stage: str) -> str | None:
    """Where the recipe decides a keyword of the trainer; None where it does not."""
    return owned_by_recipe(stage).get(keyword)


def distance(left: str, right: str) -> int:
    """Edits from `left` to `right`: insert, delete, replace, or swap two neighbours (optimal string alignment)."""
    before: list[int] = []
    last = list(range(len(right) + 1))
    for row, a in enumerate(left, start=1):
        this = [row]
        for column, b in enumerate(right, start=1):
            cost = min(last[column] + 1, this[-1] + 1, last[column - 1] + (a != b))
            if row > 1 and column > 1 and a == right[column - 2] and left[row - 2] == b:
                cost = min(cost, before[column - 2] + 1)
            this.append(cost)
        before, last = last, this
    return last[-1]


def nearest(word: str, known: Iterable[str], limit: int = 3) -> list[str]:
    """The known names that `word` most likely meant: all at the smallest distance, none when it is too far."""
    if len(word) > 60:
        return []
    word = word.lower().replace("-", "_")
    scored = sorted((distance(word, name.lower().replace("-", "_")), name) for name in known)
    if not scored:
        return []
    best = scored[0][0]
    longest = max(len(word), len(scored[0][1]))
    if best > max(1, longest // 3) or (best >= longest and best > 1):
        return []
    return [name for score, name in scored if score == best][:limit]


def did_you_mean(names: list[str]) -> str:
    """`did you mean 'a' or 'b'?`, or nothing."""
    return f"did you mean {' or '.join(repr(name) for name in names)}?" if names else ""
