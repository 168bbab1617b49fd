"""SFT on TPUs: the same recipes, rows and run folders, with JAX in place of torch.

    plan     recipe x mesh -> plan, and what is refused
    order    the order in which torch draws rows
    model    tunix's Gemma with our linear maps and adapters, sharded over a mesh
    weights  safetensors -> arrays; adapter -> PEFT's files
    step     loss, gradient, optimizer
    run      a plan in, a run folder out
    compile  memory per chip, from the compiler

Needs an environment of its own (`make setup-tpu`): tunix wants safetensors < 0.8, transformers 5.23 wants >= 0.8.
Nothing here imports torch, and nothing outside imports this but `commands.tpu`.
"""
