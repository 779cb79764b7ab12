import shutil
import subprocess
from importlib.util import find_spec
from pathlib import Path

import pytest

from vlm.evaluation.ptb_tokenizer import PUNCTUATION, caption_words

PROGRAM = "edu.stanford.nlp.process.PTBTokenizer"
# what the Java program of pycocoevalcap 1.2 was seen to answer, less the punctuation that its wrapper removes
ANSWERS = {
    "A man's T-shirt (brown) isn't his.": "a man 's t-shirt -lrb- brown -rrb- is n't his",
    '"Nice", [he] said: {wow}; ok...': "nice -lsb- he -rsb- said -lcb- wow -rcb- ok",
    "hand-held black-and-white - x -- y — z": "hand-held black-and-white x y z",
    "we cannot, gonna wanna gimme": "we can not gon na wan na gim me",
    "don't can't won't I'm he'd they'll should've": "do n't ca n't wo n't i 'm he 'd they 'll should 've",
    "don’t it’s “so”": "do n't it 's so",
    "dogs' cats' x' 'quoted'": "dogs cats x quoted",
    "rock'n'roll o'clock y'all ma'am 'tis '80s 90's '90": "rock 'n' roll o'clock y' all ma'am 't is '80s 90 's '90",
    "O'Reilly d'Artagnan po'boy": "o'reilly d'artagnan po boy",
    "Mr. X vs. Dr. Jones, St. John's Ave. etc.": "mr. x vs. dr. jones st. john 's ave. etc.",
    "U.S. flag at 5 p.m. J. Smith": "u.s. flag at 5 p.m. j. smith",
    "vitamin C. The dog. No. 5 is no. Fig. 2": "vitamin c the dog no. 5 is no fig. 2",
    "$5.00 US$5 £6 €7 5¢ 5% #1 @home #tag": "$ 5.00 us$ 5 # 6 $ 7 5 cents 5 % # 1 @home #tag",
    "10:30 1,000 3.5 1/2 1-1/2 12/25/2014 -5 x2 2x 20th": "10:30 1,000 3.5 1/2 1-1/2 12/25/2014 -5 x2 2x 20th",
    "5'10 6' 5ft. 4x4 8x10\"": "5 '10 6 5ft 4x4 8x10",
    "and/or w/o a/b/c s/he w/": "and/or w/o a/b/c s/he w /",
    "AT&T R&B b&w black &amp; white": "at&t r&b b & w black & white",
    "wow! wow!! what?! why?? no.": "wow wow !! what ?! why ?? no",
    ":) :-( ;) :D <3": ":-rrb- :--lrb- ;-rrb- :d < 3",
    "a_b a*b a=b a+b C++ a^b a~b a|b": "a_b a * b a = b a + b c++ a ^ b a ~ b a | b",
    "http://a.b/c?d=e www.foo.com x.org me@x.com pic.jpg": "http://a.b/c?d=e www.foo.com x.org me@x.com pic.jpg",
    "<b>bold</b> a < b": "<b> bold </b> a < b",
    "café naïve 日本語 привет e\u0301": "café naïve 日本語 привет e\u0301",
    "a😀b ❤ ½ ² m²": "a b ❤ 1/2 ² m ²",
    "...": "",
    "": "",
    " . , ! ": "",
}


@pytest.mark.parametrize("caption", ANSWERS)
def test_words_are_those_of_the_reference(caption):
    assert " ".join(caption_words(caption)) == ANSWERS[caption]


@pytest.mark.parametrize("line_break", ["\n", "\r", "\r\n", "\x0b", "\x0c", "\u2028", "\u2029"])
def test_a_line_break_is_a_space(line_break):
    assert caption_words(f"a dog{line_break}runs") == ("a", "dog", "runs")


def test_no_token_of_the_removal_list_is_left():
    words = caption_words("`` '' ' ` . ? ! , : - -- ... ;  a - b -- c ... d")
    assert words == ("a", "b", "c", "d")
    assert PUNCTUATION.isdisjoint(words)


def test_the_java_program_agrees():
    """Of all ANSWERS, and of the 5,000 captions of Flickr8k's validation images where they are at hand."""
    package = find_spec("pycocoevalcap")
    if package is None or shutil.which("java") is None:
        pytest.skip("needs java and pycocoevalcap")
    assert package.submodule_search_locations
    folder = Path(package.submodule_search_locations[0]) / "tokenizer"
    captions = [caption for caption in ANSWERS if caption] + flickr_captions()
    done = subprocess.run(
        ["java", "-Dfile.encoding=UTF-8", "-cp", "stanford-corenlp-3.4.1.jar", PROGRAM, "-preserveLines"],
        input="\n".join(captions),
        cwd=folder,
        capture_output=True,
        check=True,
        text=True,
        encoding="utf-8",
    )
    lines = done.stdout.splitlines()
    assert len(lines) == len(captions)
    for caption, line in zip(captions, lines, strict=True):
        words = tuple(word for word in line.lower().split(" ") if word and word not in PUNCTUATION)
        assert caption_words(caption) == words, caption


def flickr_captions():
    from vlm.data.shards import expand_shards
    from vlm.data.tar import ShardReader

    folder = Path(__file__).resolve().parents[3] / "shared" / "datasets" / "flickr8k"
    if not folder.is_dir():
        return []
    captions: list[str] = []
    for shard in expand_shards(str(folder / "val-*.tar")):
        reader = ShardReader(shard)
        for number in range(500):
            captions += reader.read_words(number)[1][""]
        reader.close()
    return captions
