"""What a model says of single images: `vlm classify` and `vlm caption`."""

from dataclasses import dataclass

from vlm.cli.options import DeviceOption, ImageArguments, JsonOption, ModelArgument
from vlm.console import bar, show_json, show_table
from vlm.errors import UsageError


@dataclass(frozen=True, kw_only=True)
class Classify:
    """Classify images into any classes by their names: vlm classify MODEL cat.jpg --classes cat,dog,car."""

    model: ModelArgument

    images: ImageArguments

    classes: str
    """Candidate classes: a,b,c or a file with one per line."""

    templates: tuple[str, ...] = ()
    """Prompt templates with {} or {c} for the class name, or files with one per line; default: three common ones."""

    top: int = 5
    """Classes shown per image."""

    device: DeviceOption = "auto"

    json: JsonOption = False

    def run(self) -> None:
        """Show the most probable classes of each image."""
        from vlm.data.sources.image_names import image_paths
        from vlm.data.transforms import load_images
        from vlm.evaluation.class_prompts import DEFAULT_TEMPLATES, read_class_names, read_templates
        from vlm.evaluation.zero_shot import classify
        from vlm.models.load import load_model

        names = read_class_names(self.classes)
        if len(names) < 2:
            raise UsageError(
                f"--classes {self.classes!r} names {len(names)} class, which every image would be; give two or more, "
                "as a,b,c or a file with one a line."
            )
        # classes and templates are checked first: a model takes long to load
        templates = read_templates(self.templates) or DEFAULT_TEMPLATES
        model = load_model(self.model, device=self.device)
        paths = image_paths(self.images)
        images = load_images(paths, model.view)
        probabilities = classify(model, images, names, templates)
        results = []
        for path, row in zip(paths, probabilities.tolist(), strict=True):
            # stable: classes of equal probability stay in the order given
            ranked = sorted(zip(names, row, strict=True), key=lambda entry: -entry[1])[: self.top]
            classes = [{"name": name, "probability": probability} for name, probability in ranked]
            results.append({"image": str(path), "classes": classes})
        if self.json:
            show_json(results)
            return
        for result in results:
            rows = [[entry["name"], entry["probability"], bar(entry["probability"])] for entry in result["classes"]]
            show_table(["class", "probability", ""], rows, title=result["image"])


@dataclass(frozen=True, kw_only=True)
class Caption:
    """Caption images with a model that has a caption decoder, e.g. one of vlm train tiny-coca."""

    model: ModelArgument

    images: ImageArguments

    prompt: str = ""
    """Prefix of every caption, e.g. "a picture of"."""

    device: DeviceOption = "auto"

    json: JsonOption = False

    def run(self) -> None:
        """Show a caption for each image."""
        from vlm.data.transforms import load_images
        from vlm.models.load import load_model

        model = load_model(self.model, device=self.device)
        captions = model.caption_images(load_images(self.images, model.view), self.prompt)
        rows = [{"image": str(path), "caption": text} for path, text in zip(self.images, captions, strict=True)]
        if self.json:
            show_json(rows)
        else:
            show_table(["image", "caption"], [list(row.values()) for row in rows])
