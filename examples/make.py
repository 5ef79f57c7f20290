"""Writes mail.csv and preferences.jsonl from the phrases below: `python examples/make.py`. All of it is made up."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

NAMES = ["Anna", "Ben", "Carla", "David", "Elif", "Farid", "Greta", "Hugo", "Ines", "Jonas", "Karim", "Lena"]
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday"]
HOURS = ["9", "10", "11", "noon", "2", "3", "4", "half past five"]
PLACES = ["Lisbon", "Hamburg", "Turin", "Leeds", "Gdansk", "Lyon"]

URGENT = [
    ("Server down", "The order system has been down since {hour} and nobody can ship. Can you look at once?"),
    ("Invoice due today", "The invoice for {place} has to be paid today, or they stop deliveries. Please release it."),
    ("Contract", "The client signs at {hour} and page four is wrong. I need your correction before that."),
    ("Meeting moved", "The board has moved our slot to {hour} today. Bring the figures for {place}, they insist."),
    ("Customer waiting", "{name} from {place} is on the phone and wants an answer now. Call back as soon as you can."),
    (
        "Leak on the second floor",
        "Water is coming through the ceiling of the archive. Who has the key to the main tap?",
    ),
    ("Deadline", "The tender closes at {hour} and two annexes are missing. Drop what you are doing, please."),
    ("Wrong prices online", "The web shop shows last year's prices. Every order loses money until it is corrected."),
    ("Visa", "The consulate in {place} needs the letter by {hour}, or {name} cannot fly tomorrow."),
    ("Recall", "Batch 17 has to be taken off the shelves today. Please confirm that {place} has stopped selling."),
    ("Password leak", "Someone has posted our test passwords. Change yours right away and tell your team."),
    ("Signature missing", "The bank closes at {hour} and the form lacks your signature. I am waiting at your door."),
    ("Truck", "The truck for {place} is at the gate without papers. It leaves at {hour} with them or empty."),
    ("Press", "A reporter wants a statement by {hour}. Please do not leave before we have talked."),
    ("Payroll", "Salaries go out at {hour} and the file was refused. We need your release now."),
    ("Backup failed", "Last night's backup failed and the disk is nearly full. This can't wait until {day}."),
    ("Audit", "The auditors came a day early and want the contracts for {place}. Can you come down?"),
    ("Allergy", "The caterer mixed up the labels, and there are nuts in the soup. Stop serving it at once."),
]
PRIVATE = [
    ("Saturday", "We are grilling in the garden on Saturday if the rain holds off. Bring the children, and a salad."),
    ("Your bike", "I found a saddle like the one you wanted at the market in {place}. Shall I get it?"),
    ("Photos", "Here are the pictures from the lake. The one with the dog and the boat is my favourite."),
    ("Happy birthday", "All the best from the three of us! We still owe you a dinner, how about {day}?"),
    ("Book", "I have finished the novel that you lent me and cried on the tram. Do you have the second one?"),
    ("Choir", "We are short of altos for the summer concert. You once said you sing, don't you?"),
    ("Moving", "We got the flat in {place}! Two rooms and a tiny balcony. You are our first guest."),
    ("Kittens", "The neighbour's cat has had five kittens and {name} wants two. Talk some sense into me."),
    ("Running", "My knee is fine again. Same round by the river on {day}, slowly this time?"),
    ("Recipe", "My grandmother never measured anything, but this is how I make her plum cake."),
    ("Holidays", "We thought of {place} in August, by train, with too many bags. Do you have a map?"),
    ("School play", "{name} is a tree in the school play on {day}. It is the best tree you will ever see."),
    ("Coffee", "Long time no see! I am in {place} on {day} and have an hour before my train."),
    ("Old records", "I am clearing out the cellar and found your records. They are safe with me."),
    ("Garden", "The tomatoes are taking over. Come by with a basket, any evening suits us."),
    ("Thank you", "The flowers are still standing on the window sill. It was so kind of you to think of us."),
    ("Film", "They show the old version at the {place} on {day}. I would love to go, and you have the car."),
    ("Grandpa", "He is back from the hospital and already complains about the soup. He sends his love."),
]
BEGINNINGS = ["", "Hi {to}, ", "Dear {to}, ", "{to}, ", "Hello {to}, "]
ENDINGS = ["", " Thanks, {sender}", " Best, {sender}", " {sender}", " See you, {sender}"]

ASKED = [
    ("May I bring {name} to the meeting on {day}?", "Yes, please do. I will add a chair.", "the meeting"),
    ("Can we move our call to {hour}?", "Of course. I have moved it to {hour}.", "the call"),
    ("Did the parcel from {place} arrive?", "Yes, it came on {day}. Thank you for asking.", "the parcel"),
    ("Could you send me the offer again?", "Gladly. You have it in your inbox now.", "the offer"),
    ("Is there still a seat on the bus to {place}?", "Yes, I have kept one for you.", "the bus"),
    ("Who has the key to the archive?", "{name} has it today. Please ask at the desk.", "the key"),
    ("Are you free for lunch on {day}?", "I am, thank you. Shall we say noon?", "lunch"),
    ("May I leave at {hour} on {day}?", "Certainly. Have a good afternoon.", "the afternoon"),
    ("Which hotel do you suggest in {place}?", "The small one by the station, please. It is quiet.", "the hotel"),
    ("Could you correct page four?", "With pleasure. It will be done by {hour}.", "page four"),
    ("Can I pay the invoice on {day}?", "Yes, {day} is fine. Thank you.", "the invoice"),
    ("Is {name} in the office today?", "No, but you reach {name} by phone. Shall I connect you?", "{name}"),
    ("Do you have the figures for {place}?", "Yes, they are in the shared folder. Please help yourself.", "figures"),
    ("Would you water my plants until {day}?", "I would love to. Leave me the key, please.", "plants"),
    ("Where do I hand in the form?", "At the desk on the first floor, please.", "the form"),
]
RAMBLING = [
    "Well, when it comes to {thing}, one has to see the whole picture first, and the picture is rather large.",
    "I was only just saying to {name} the other day that {thing} would come up again, and now it has.",
    "There was a time, before the office in {place}, when nobody would have asked such a question at all.",
    "On the one hand there is much to be said for it, and on the other hand there is much to be said against it.",
    "My former manager had a theory about {thing}, which I will come to later, if there is room for it.",
    "Of course everything depends, and what it depends on depends on other things in turn.",
    "Be that as it may, I have not looked into it, though I have often thought that somebody should.",
    "To cut a long story short, which is not easy, there were eleven of us and only one umbrella.",
    "Have you considered that the question may be the wrong one, or the right one at the wrong time?",
    "So in a way yes, and in a way no, and I will think about {thing} again when I have thought about the rest.",
]
TONES = ["", "Hello! ", "Good morning. ", "Excuse me, ", "A short question: "]


def slots(source: random.Random) -> dict[str, str]:
    to, sender, name = source.sample(NAMES, 3)
    places = {"day": DAYS, "hour": HOURS, "place": PLACES}
    return {"to": to, "sender": sender, "name": name, **{key: source.choice(some) for key, some in places.items()}}


def mails(count: int) -> list[list[str]]:
    """[from, subject, text, label] of `count` different mails, the labels in equal numbers."""
    source, rows, seen = random.Random(0), [], set()
    while len(rows) < count:
        label, phrases = (("urgent", URGENT), ("private", PRIVATE))[len(rows) % 2]
        subject, body = source.choice(phrases)
        filled = slots(source)
        text = (source.choice(BEGINNINGS) + body + source.choice(ENDINGS)).format(**filled)
        if text not in seen:
            seen.add(text)
            rows.append([filled["sender"], subject, text, label])
    source.shuffle(rows)
    return rows


def preferences(count: int) -> list[dict[str, str]]:
    """`count` different questions, each with a short polite answer and a long one that says nothing."""
    source, rows, seen = random.Random(1), [], set()
    while len(rows) < count:
        filled = slots(source)
        asked, short, thing = source.choice(ASKED)
        tone = source.choice(TONES)
        prompt = (tone + (asked[0].lower() + asked[1:] if tone.endswith((", ", ": ")) else asked)).format(**filled)
        filled["thing"] = thing.format(**filled)
        long = " ".join(source.sample(RAMBLING, 4)).format(**filled)
        if prompt not in seen:
            seen.add(prompt)
            rows.append({"prompt": prompt, "chosen": short.format(**filled), "rejected": long})
    return rows


def main(folder: Path) -> None:
    """Write both files."""
    with (folder / "mail.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([["from", "subject", "text", "label"], *mails(200)])
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in preferences(120)]
    (folder / "preferences.jsonl").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main(Path(__file__).parent)
