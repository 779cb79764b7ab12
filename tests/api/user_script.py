"""What a user writes, in ten lines, under pyright's strict mode (test_user_script.py)."""

import vlm

model = vlm.load("runs/first", device="cpu")
rows = model.embed_images(["a.jpg", "b.jpg"], on_error="skip")
print(rows.shape[0], model.embed_texts("a red circle")[0].mean(), model.similarity("a.jpg", ["red", "blue"]).max())
for result in model.classify("photos", {"cat": ["a photo of a cat"], "dog": "a dog"}, top=1):
    print(result.image, result.best, [entry.probability for entry in result.classes])
if model.can_caption:
    print([result.caption.upper() for result in model.caption(b"bytes of a file", prompt="a")])
packed = vlm.pack("photos", "shards", hold_out=20)
print(packed.samples, vlm.embed(model, "shards", "embeddings").to_json())
run = vlm.train("tiny", data="shards", run="runs/second", steps=4)
print(run.samples, vlm.evaluate(model, retrieval="shards").to_json())
try:
    vlm.load("nowhere")
except vlm.VlmError as error:
    print(error)
