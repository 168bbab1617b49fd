"""What leaves the toolkit, and the proof that it is what was trained.

subject.py   a run, an adapter or a model, as it lies on the disk
names.py     one name for a weight, whatever class its checkpoint was saved in
weights.py   the tensors of a checkpoint, one at a time
updates.py   saved adapters -> the change of each weight
merge.py     base + change -> a checkpoint in the base's own layout, in bounded memory
gguf/        the same weights as GGUF, and an adapter as GGUF
ollama.py    a Modelfile whose TEMPLATE renders what the model was trained on
adapter.py   an adapter with the names of the class that a server loads
proof.py     what was written against base + adapter
papers.py    licence, notice, model card
card.py      the model card, section by section
staging.py   nothing stands under its final name before it is whole
serve.py     the commands that serve the result
push.py      to the hub
"""
