"""What a user writes, under pyright's strict mode (test_user_script.py)."""

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
with vlm.stream(["a", "b"], batch_size=8, tokenizer=lambda texts: [[len(text)] for text in texts]) as batches:
    for batch in batches:
        print(batch.images.shape[0], batch.tokens.sum().item(), batch.uids[0].upper(), len(batch.failures))
    batches.load_state_dict(batches.state_dict())
print(vlm.train_tokenizer("shards", "words.model").pieces, [entry.model for entry in vlm.list_models().models])
print([overview.best for overview in vlm.list_runs()], vlm.compare_runs(["a", "b"]).verdicts())
run = vlm.train("tiny", data="shards", run="runs/second", steps=4)
print(run.samples, vlm.evaluate(model, retrieval="shards").to_json())
try:
    vlm.load("nowhere")
except vlm.VlmError as error:
    print(error)
