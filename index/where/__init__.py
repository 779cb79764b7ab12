"""The filter language: `language = 'en' and width >= 512 and tags has 'dog'`, and the rows a condition chooses.

    field = value        one of the field's values is this; `has` is the same, and reads better for lists
    field < <= > >= 1.5  one of them is in this order: numbers by size, texts by character (so do dates as 2024-05-31)
    field in (1, 'a')    one of them is one of these
    field like 'a%'      one of them fits: % is any run of characters, capital letters A to Z count as small ones
    field is missing     the row has no value of the field

`!=`, `not in`, `not has` and `not like` choose the rows that have the field, but none of whose values is so; `is not
missing` those that have it. Conditions are joined by `not`, `and`, `or` (in that order) and parentheses; `not
condition` is every row the condition does not choose, those without the field too. Texts stand in 'single quotes'
('' is a quote), names in "double quotes" where they hold more than letters, digits, _ and dots or are a word of the
language. true and false are 1 and 0.
"""

from vlm.index.where.conditions import Condition
from vlm.index.where.parse import parse_where
from vlm.index.where.rows import rows_where

__all__ = ["Condition", "parse_where", "rows_where"]
