"""Everyday questions, each with a short answer: to learn to be concise, as in ES at scale (Qiu et al., 2025).

They were written for zoray. The reward `length` compares with how long `data["answer"]` is, not with what it says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from zoray.records import Example, Message, Sampling, Splits
from zoray.tasks.base import Task, check_sizes, seeded_split

QUESTIONS = {
    "What is the capital of France?": "Paris.",
    "What is the capital of Japan?": "Tokyo.",
    "What is the capital of Kenya?": "Nairobi.",
    "What is the capital of Canada?": "Ottawa.",
    "What is the capital of Australia?": "Canberra.",
    "What is the capital of Brazil?": "Brasília.",
    "What is the largest ocean on Earth?": "The Pacific Ocean.",
    "What is the longest river in Europe?": "The Volga.",
    "What is the highest mountain in the world?": "Mount Everest.",
    "On which continent is Egypt?": "Africa.",
    "Which country has the most people?": "India.",
    "Which sea lies between Europe and Africa?": "The Mediterranean Sea.",
    "Which two countries share the longest land border?": "Canada and the United States.",
    "Which language is spoken in Brazil?": "Portuguese.",
    "What currency is used in Japan?": "The yen.",
    "How many continents are there?": "Seven.",
    "Which planet is closest to the Sun?": "Mercury.",
    "Which planet is the largest in the solar system?": "Jupiter.",
    "Which planet is known for its rings?": "Saturn.",
    "How many moons does the Earth have?": "One.",
    "How long does the Earth take to go around the Sun?": "About 365 days.",
    "What is the nearest star to the Earth?": "The Sun.",
    "Who was the first person to walk on the Moon?": "Neil Armstrong.",
    "What do we call a scientist who studies stars?": "An astronomer.",
    "What is the chemical symbol for gold?": "Au.",
    "What is water made of?": "Hydrogen and oxygen.",
    "At what temperature does water boil at sea level?": "100 degrees Celsius.",
    "At what temperature does water freeze?": "0 degrees Celsius.",
    "Which gas do plants take from the air?": "Carbon dioxide.",
    "Which gas do we need to breathe?": "Oxygen.",
    "What force pulls objects towards the ground?": "Gravity.",
    "What is the hardest natural material?": "Diamond.",
    "Which metal is liquid at room temperature?": "Mercury.",
    "What does a thermometer measure?": "Temperature.",
    "Why is the sky blue?": "Air scatters blue light more than other colours.",
    "Why do we see lightning before we hear thunder?": "Light travels faster than sound.",
    "What causes the tides?": "The pull of the Moon and the Sun.",
    "Why does ice float on water?": "It is less dense than water.",
    "What makes a rainbow?": "Sunlight that is split by drops of rain.",
    "Why do leaves look green?": "They contain chlorophyll.",
    "How many legs does a spider have?": "Eight.",
    "How many legs does an insect have?": "Six.",
    "What is the largest animal that ever lived?": "The blue whale.",
    "What is the fastest land animal?": "The cheetah.",
    "Which bird lays the largest eggs?": "The ostrich.",
    "What do pandas eat?": "Bamboo.",
    "What do bees make from nectar?": "Honey.",
    "What do caterpillars turn into?": "Butterflies or moths.",
    "What is a baby dog called?": "A puppy.",
    "What is a group of wolves called?": "A pack.",
    "Is a whale a fish?": "No, it is a mammal.",
    "Which animal is known for changing its colour?": "The chameleon.",
    "Can penguins fly?": "No.",
    "Which organ pumps blood through the body?": "The heart.",
    "How many bones does an adult human have?": "206.",
    "How many teeth does an adult usually have?": "32.",
    "What is the largest organ of the human body?": "The skin.",
    "Which vitamin does the skin make in sunlight?": "Vitamin D.",
    "Which part of the body do we think with?": "The brain.",
    "What carries oxygen in the blood?": "Red blood cells.",
    "How many hours should an adult sleep at night?": "Seven to nine.",
    "What is 3 + 5?": "8.",
    "What is 7 times 8?": "56.",
    "What is half of 90?": "45.",
    "What is the square root of 144?": "12.",
    "What is 10 percent of 250?": "25.",
    "How many sides does a hexagon have?": "Six.",
    "How many degrees are in a right angle?": "90.",
    "What is the smallest prime number?": "2.",
    "What is the next number after 2, 4, 8, 16?": "32.",
    "How many minutes are in two hours?": "120.",
    "How many seconds are in a minute?": "60.",
    "How many days are in a leap year?": "366.",
    "How many weeks are in a year?": "52.",
    "Which month has the fewest days?": "February.",
    "Which day comes after Thursday?": "Friday.",
    "How many grams are in a kilogram?": "1,000.",
    "How many centimetres are in a metre?": "100.",
    "How many years are in a century?": "100.",
    "Who wrote Romeo and Juliet?": "William Shakespeare.",
    "Who wrote Don Quixote?": "Miguel de Cervantes.",
    "Who wrote Pride and Prejudice?": "Jane Austen.",
    "Who painted the Mona Lisa?": "Leonardo da Vinci.",
    "Who composed the Ninth Symphony with the Ode to Joy?": "Ludwig van Beethoven.",
    "Who developed the theory of relativity?": "Albert Einstein.",
    "Who discovered penicillin?": "Alexander Fleming.",
    "In which year did the Second World War end?": "1945.",
    "In which year did the Berlin Wall fall?": "1989.",
    "Who was the first president of the United States?": "George Washington.",
    "In which country were the first Olympic Games held?": "Greece.",
    "Which people built Machu Picchu?": "The Incas.",
    "Which ancient people built the pyramids of Giza?": "The Egyptians.",
    "How many strings does a violin have?": "Four.",
    "How many keys does a standard piano have?": "88.",
    "How many players does a football team have on the field?": "Eleven.",
    "How many squares are on a chessboard?": "64.",
    "In which sport do players score home runs?": "Baseball.",
    "How often are the Summer Olympics held?": "Every four years.",
    "What colour do you get from mixing blue and yellow?": "Green.",
    "What colour do you get from mixing red and white?": "Pink.",
    "What are the three primary colours of light?": "Red, green and blue.",
    "What colours are on the flag of Italy?": "Green, white and red.",
    "What is the opposite of hot?": "Cold.",
    "What is the plural of mouse?": "Mice.",
    "What is the past tense of go?": "Went.",
    "What is another word for happy?": "Glad.",
    "How many letters does the English alphabet have?": "26.",
    "Which letter comes after M?": "N.",
    "What is bread mainly made from?": "Flour, water and yeast.",
    "What is cheese made from?": "Milk.",
    "Which nut is used to make marzipan?": "The almond.",
    "Which fruit is dried to make raisins?": "Grapes.",
    "What is the main ingredient of guacamole?": "Avocado.",
    "Which spice is the most expensive?": "Saffron.",
    "How long should I boil an egg to make it hard?": "About ten minutes.",
    "What do I need to make tea?": "Hot water and tea leaves.",
    "What does CPU stand for?": "Central processing unit.",
    "How many bits are in a byte?": "Eight.",
    "What is a computer's keyboard used for?": "Typing.",
    "What do you call a word that reads the same backwards?": "A palindrome.",
    "If all birds have feathers and a crow is a bird, does a crow have feathers?": "Yes.",
    "Is a tomato a fruit or a vegetable?": "Botanically a fruit.",
    "What should you do at a red traffic light?": "Stop.",
    "Which number do you call in an emergency in Europe?": "112.",
}


@dataclass(frozen=True)
class Questions(Task):
    """General questions, as messages of a chat (`chat`) or as "Question: ... Answer:"."""

    metric: ClassVar[str | None] = "reward"
    sampling: ClassVar[Sampling] = Sampling(max_tokens=64)

    train: int = 64
    dev: int = 24
    test: int = 32
    seed: int = 0
    chat: bool = True

    def __post_init__(self) -> None:
        check_sizes(self.train, self.dev, self.test, self.seed)

    def load(self) -> Splits:
        """Split the questions."""
        rows = [self._example(question, answer) for question, answer in QUESTIONS.items()]
        test, dev, train = seeded_split(rows, (self.test, self.dev, self.train), self.seed, "task=questions")
        return Splits(train, dev, test)

    def _example(self, question: str, answer: str) -> Example:
        prompt = (Message("user", question),) if self.chat else f"Question: {question}\nAnswer:"
        return Example(prompt, data={"answer": answer})
