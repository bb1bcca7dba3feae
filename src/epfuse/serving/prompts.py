"""Texts whose log probabilities the gate compares: prose, code, numbers, a list, and other languages."""

from __future__ import annotations

PROMPTS = (
    "The harbour was quiet when the first boats came back, and nobody asked what they had caught.",
    "Water boils at a lower temperature on a mountain, because the air presses less on its surface.",
    "def mean(values):\n    total = 0.0\n    for v in values:\n        total += v\n    return total / len(values)\n",
    "If a train leaves at 9:40 and needs 2 hours and 35 minutes, it arrives at 12:15.",
    "Three primary colours of light are red, green and blue; together they give white.",
    "SELECT name, COUNT(*) FROM orders GROUP BY name ORDER BY COUNT(*) DESC LIMIT 10;",
    "Die Rechnung ging nicht auf, also begann sie noch einmal von vorn und zählte langsamer.",
    "El tren de las nueve llegó tarde, pero la estación todavía estaba llena de gente.",
    '{"name": "sensor-7", "readings": [0.25, 0.5, 0.75, 1.0], "unit": "bar", "valid": true}',
    "To whom it may concern: the parcel arrived open, two of the five parts are missing, and one is bent.",
    "1, 1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144: each number is the sum of the two before it.",
    "A judge must hear both sides; one who has heard only the first has heard a story and not a case.",
)
