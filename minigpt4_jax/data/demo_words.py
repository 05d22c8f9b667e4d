"""The words that the demo's conversation texts know (demo_texts.py): things, people, colours.

Only tables; each says what its words allow or forbid.
"""

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Thing:
    """Something that yes-or-no questions ask for.

    one, many: words that name it; a "yes" needs them in `least` captions.
    hints: beginnings of words that forbid a "no", beside one and many.
    rate: share of the photos without it that ask for it, set so that the training
        photos give as many "no" as "yes": the question alone does not tell the answer.
    unless: beginnings of words that forbid a "yes".
    """

    name: str
    one: str
    many: str
    hints: str
    rate: float
    least: int = 2
    unless: str = ""

    @cached_property
    def words(self) -> frozenset[str]:
        return frozenset(f"{self.one} {self.many}".split())

    @cached_property
    def whole(self) -> frozenset[str]:
        """Words that forbid a "no" as they are: too short to be a beginning."""
        return WHOLE.intersection(f"{self.one} {self.many} {self.hints}".split())

    @cached_property
    def starts(self) -> tuple[str, ...]:
        """Beginnings of the other words that forbid it."""
        every = f"{self.one} {self.many} {self.hints}".split()
        return tuple(word for word in every if word not in WHOLE)


WHOLE = frozenset("it he she his her him who man men cat son".split())
_PET = "animal pet creature canine"
_DOG = (
    "dog pup pood retriev terrier shep hound greyh collie lab husk beagle bull dachs "
    "corgi dalm box pug chihuahua rott dober spaniel mutt pooch mastiff setter whippet"
)
_ANYONE = (
    "person people human someone somebody they their them who couple famil crowd group "
    "team band others pair friend spectat audience onlook stranger pedestrian tourist "
    "traffic parade market vehicle adult member police"
)
_MALE = "man men guy gentlem male he his him father dad husband groom brother cowboy"
_FEMALE = "woman women lad female she her mother mom wife bride sister bikini"
_YOUNG = "child kid toddler baby babies infant teen youth student school class scout"
_LAKE = "water lake river ocean sea pond pool beach shore dock harbor bay canal pier"

THINGS = (
    Thing("a dog", "dog puppy", "dogs puppies", f"{_DOG} {_PET} it", 0.23),
    Thing("a cat", "cat kitten", "cats kittens", f"kitt felin tabby {_PET} it", 0.0022),
    Thing(
        "a horse",
        "horse pony",
        "horses ponies",
        f"horse pony ponies colt rodeo jockey equest polo saddle carriage donkey bronc "
        f"cowboy mule bull mare hoof {_PET}",
        0.0071,
    ),
    Thing(
        "a bird",
        "bird seagull duck parrot pigeon eagle",
        "birds seagulls ducks parrots pigeons eagles",
        f"bird seag gull duck goose geese swan parrot pigeon eagle hawk owl flamingo "
        f"pelican penguin heron crane chick roost fowl wing feather sky fly flies {_PET}",
        0.0084,
    ),
    Thing(
        "a man",
        "man guy gentleman",
        "men guys gentlemen",
        f"{_MALE} {_ANYONE} boy leash street city",
        0.6,
        least=3,
    ),
    Thing(
        "a woman",
        "woman lady",
        "women ladies",
        f"{_FEMALE} {_ANYONE} girl leash street city",
        0.24,
        least=3,
    ),
    Thing("a boy", "boy", "boys", f"{_MALE} {_YOUNG} {_ANYONE} boy son", 0.34, least=3),
    Thing(
        "a girl",
        "girl",
        "girls",
        f"{_FEMALE} {_YOUNG} {_ANYONE} girl daughter",
        0.25,
        least=3,
    ),
    Thing(
        "a ball",
        "ball",
        "balls",
        "ball foot basket base volley soccer tennis golf hockey rugby polo cricket "
        "lacrosse croquet bowl game play sport toy object something juggl catch throw "
        "toss kick bat racket racquet team match field court",
        0.056,
    ),
    Thing(
        "a bicycle",
        "bicycle bike",
        "bicycles bikes",
        "bicy bik bmx cycl tricy motor moto pedal rid wheel race street city parking",
        0.021,
        unless="motor moto dirt scooter quad atv engine rac",
    ),
    Thing(
        "a motorcycle",
        "motorcycle motorbike",
        "motorcycles motorbikes",
        "motor moto bik cycl scooter dirtbike atv rid wheel rac street city parking",
        0.011,
    ),
    Thing(
        "a car",
        "car",
        "cars",
        "car vehicle automobile truck van taxi cab suv jeep bus traffic street road "
        "city parking park driv rac ralli garage highway wheel intersection crowd sidewalk "
        "building store shop",
        0.015,
    ),
    Thing(
        "a boat",
        "boat canoe kayak sailboat",
        "boats canoes kayaks sailboats",
        f"boat canoe kayak raft sail ship ferr gondola yacht paddl row tub {_LAKE}",
        0.011,
    ),
    Thing(
        "snow",
        "snow",
        "",
        "snow ski ic sled winter blizzard glacier mountain cold froz frost white slope "
        "hockey sleigh",
        0.041,
    ),
    Thing(
        "a skateboard",
        "skateboard",
        "skateboards",
        "skat board longboard ramp trick half",
        0.012,
    ),
    Thing(
        "a guitar",
        "guitar",
        "guitars",
        "guitar music instrument band bass banjo ukulele string sing song play stage",
        0.0031,
    ),
)

COMMON = 0.35  # share kept of the answers "One." and "A dog.", else most of all answers

PEOPLE_ONE = frozenset("man woman boy girl person child kid lady guy toddler".split())
PEOPLE_MANY = frozenset("men women boys girls people children kids ladies guys".split())
MALE = frozenset("man men guy guys boy boys".split())
FEMALE = frozenset("woman women lady ladies girl girls".split())
DOG_ONE = frozenset("dog puppy".split())
DOG_MANY = frozenset("dogs puppies".split())
NUMBERS = {
    word: number
    for number, word in enumerate("zero one two three four five six seven".split())
}
# After these a count is a guess.
VAGUE = frozenset(
    "group crowd couple pair family team others some several many few lot bunch "
    "audience spectators onlookers band class another's friends various".split()
)
# Words ending as names of people do ("skier", "cyclist") that are not people.
NOT_PEOPLE = frozenset(
    "water over under another other after her soccer together older younger river for "
    "outdoors outdoor indoors indoor winter summer flower flowers floor floors number "
    "numbers sweater sweaters or paper papers door doors silver leather smaller larger "
    "bigger corner counter color colors center summer underwater sprinkler sprinklers "
    "shoulder shoulders finger fingers mirror ladder pier rubber shower barrier tower "
    "meter boulder waters motor newspaper retriever terrier german border".split()
)

COLORS = frozenset(
    "black white brown red blue green yellow orange pink purple gray grey tan".split()
)
COLORED = "dog shirt jacket hat dress coat ball helmet car bike bicycle horse".split()
ANIMALS = {
    "dog": "dog dogs puppy puppies",
    "cat": "cat cats kitten kittens",
    "horse": "horse horses",
    "bird": "bird birds seagull seagulls",
    "cow": "cow cows",
    "elephant": "elephant elephants",
    "sheep": "sheep",
    "giraffe": "giraffe giraffes",
    "zebra": "zebra zebras",
    "bear": "bear bears",
    "monkey": "monkey monkeys",
}
# A "toy dog" or a "dog house" is no dog.
BEFORE_FALSE = frozenset(
    "toy stuffed fake plush inflatable model hot teddy no without paper plastic cardboard "
    "painted wooden metal bronze pool parking rocking sports".split()
)
AFTER_FALSE = frozenset(
    "costume statue statues mask masks park house path rack track tracks station show "
    "race races pen toy toys food stop door seat lot sculpture suit bath trailer sled "
    "ride like toss pit game court player players team head heads scouts scout shaped "
    "themed field uniform jersey handler hole tire wheel ramp balloon wash carrier "
    "trail lane shop s bed collar leash cap helmet jump hoop course print bike case "
    "strings cut cutout racing glove bat angel suit suits ball machine boots pants covered".split()
)

# Words between article and noun that make the noun another one's attribute or object.
NOT_ADJECTIVE = frozenset(
    "in on of with by at and to near from for is are while who that his her its the a "
    "an as over through into".split()
)
PRESENT = {
    verb: participle
    for verb, participle in (
        pair.split(":")
        for pair in "runs:running jumps:jumping walks:walking sits:sitting "
        "stands:standing plays:playing holds:holding rides:riding leaps:leaping "
        "climbs:climbing carries:carrying catches:catching swims:swimming "
        "throws:throwing chases:chasing slides:sliding performs:performing "
        "kicks:kicking pulls:pulling lies:lying looks:looking".split()
    )
}
# They say how somebody looks, or end in -ing without being an action.
NOT_ACTIONS = frozenset(
    "wearing being having doing going getting including belonging evening morning".split()
)
