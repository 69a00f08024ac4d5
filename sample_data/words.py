"""English for the sample pictures: from an emoji's label to captions as a person would write.

The labels are emojibase's (MIT). The rules here only add what a label lacks to be a caption: an
article, a preposition, a kind ("an animal"), and they name the head noun, the word that a caption
must contain to name the thing.
"""

from __future__ import annotations

import re


def listed(text: str) -> frozenset[str]:
    """Read a list of words."""
    return frozenset(text.split())


KINDS = {
    "face-smiling": "a happy face",
    "face-affection": "a loving face",
    "face-unwell": "an unwell face",
    "face-sleepy": "a sleepy face",
    "face-concerned": "an unhappy face",
    "cat-face": "a cat",
    "monkey-face": "a monkey",
    "heart": "a symbol of love",
    "person-role": "a person at work",
    "person-fantasy": "a fantasy figure",
    "person-sport": "sport",
    "animal-mammal": "an animal",
    "animal-bird": "a bird",
    "animal-amphibian": "an animal",
    "animal-reptile": "a reptile",
    "animal-marine": "a sea animal",
    "animal-bug": "a small animal",
    "plant-flower": "a flower",
    "plant-other": "a plant",
    "food-fruit": "a fruit",
    "food-vegetable": "a vegetable",
    "food-prepared": "food",
    "food-asian": "asian food",
    "food-sweet": "a sweet dessert",
    "drink": "a drink",
    "dishware": "kitchenware",
    "place-map": "geography",
    "place-geographic": "a landscape",
    "place-building": "a building",
    "place-religious": "a religious building",
    "place-other": "a place",
    "transport-ground": "land transport",
    "transport-water": "water transport",
    "transport-air": "air transport",
    "time": "a timepiece",
    "sky-weather": "sky and weather",
    "event": "a celebration",
    "award-medal": "an award",
    "sport": "sports equipment",
    "game": "a game",
    "clothing": "clothing",
    "sound": "sound",
    "music": "music",
    "musical-instrument": "a musical instrument",
    "phone": "communication",
    "computer": "an electronic device",
    "light-video": "light and video",
    "book-paper": "paper",
    "money": "money",
    "mail": "mail",
    "writing": "a writing tool",
    "office": "office supplies",
    "lock": "security",
    "tool": "a tool",
    "science": "science",
    "medical": "medicine",
    "household": "a household item",
}

# Nouns that their subgroup's kind doesn't fit (a brick among the buildings), and people whose work
# isn't shown.
NOT_OF_ITS_KIND = listed(
    """
    brick wood rock construction man woman person prince princess ninja prints feather wing
    nest lipstick ring stone beads crown amulet leaf leaves mushroom fan pick house-of-cards
    ice barrier drum pump seat satellite wedding statue face nose
    """
)

# Tags that tell more about what is seen; the others are feelings, slang and far associations.
TELLING = listed(
    """
    fruit vegetable animal bird fish insect flower plant tree food drink dessert vehicle car
    boat train building clothes shoe instrument weapon book money mail medicine doctor
    sport ball game music phone computer kitchen breakfast meat seafood cake bakery beach
    ocean sea sky night weather rain snow winter summer spring autumn christmas halloween
    birthday party wedding celebration school office hospital church religion space travel
    transportation camera movie clock farm garden forest jungle pet dinosaur
    reptile happy sad angry tired sick surprised scared love smile laugh cry sleep worried
    pink bee pig cow dog cat horse
    beer wine coffee tea chocolate sugar salad soup noodles rice bread egg baby mother
    father doctor police magic monster finger gift toy
    paper pen letter television video radio telephone battery electric fire water ice sun
    moon cloud mountain river house home city town street road bridge flower rose
    leaf wood metal gold silver bottle glass cup plate knife fork spoon hat shirt bag
    jewelry bath bathroom bed furniture door lock science chemistry health
    """
)

# Labels whose words are no noun phrase, or whose head the rules would miss: (caption, head noun).
IRREGULAR = {
    "face with steam from nose": ("a face with steam coming from its nose", "face"),
    "face with symbols on mouth": ("a face with symbols on its mouth", "face"),
    "face with hand over mouth": ("a face with a hand over its mouth", "face"),
    "face with open eyes and hand over mouth": (
        "a face with open eyes and a hand over its mouth",
        "face",
    ),
    "speaker low volume": ("a speaker at low volume", "speaker"),
    "speaker medium volume": ("a speaker at medium volume", "speaker"),
    "speaker high volume": ("a speaker at high volume", "speaker"),
    "canned food": ("a can of food", "can"),
    "leafy green": ("a leafy green vegetable", "leafy"),
    "family: adult, adult, child": ("a family of two adults and a child", "family"),
    "family: adult, adult, child, child": ("a family of two adults and two children", "family"),
    "family: adult, child": ("a family of an adult and a child", "family"),
    "family: adult, child, child": ("a family of an adult and two children", "family"),
    "herb": ("a sprig of herb", "herb"),
    "nest with eggs": ("a nest with eggs", "nest"),
    "rolling on the floor laughing": ("a face rolling on the floor laughing", "face"),
    "star-struck": ("a star-struck face", "face"),
    "sad but relieved face": ("a sad but relieved face", "face"),
    "head shaking horizontally": ("a head shaking from side to side", "head"),
    "head shaking vertically": ("a nodding head", "head"),
    "face in clouds": ("a face in the clouds", "face"),
    "face with tongue": ("a face with its tongue out", "face"),
    "winking face with tongue": ("a winking face with its tongue out", "face"),
    "squinting face with tongue": ("a squinting face with its tongue out", "face"),
    "dotted line face": ("a face drawn with a dotted line", "face"),
    "face screaming in fear": ("a face screaming in fear", "face"),
    "skull and crossbones": ("a skull and crossbones", "skull"),
    "heart on fire": ("a heart on fire", "heart"),
    "heart exclamation": ("a heart exclamation mark", "heart"),
    "hundred points": ("a red hundred points symbol", "hundred"),
    "dizzy": ("a dizzy star", "star"),
    "collision": ("a collision burst", "collision"),
    "dashing away": ("a cloud of dust from dashing away", "cloud"),
    "eye in speech bubble": ("an eye in a speech bubble", "eye"),
    "left speech bubble": ("a speech bubble on the left", "bubble"),
    "right anger bubble": ("an anger bubble on the right", "bubble"),
    "zzz": ("the letters zzz for sleep", "zzz"),
    "raised back of hand": ("the raised back of a hand", "hand"),
    "palm down hand": ("a hand with the palm down", "hand"),
    "palm up hand": ("a hand with the palm up", "hand"),
    "ok hand": ("an ok hand", "hand"),
    "hand with index finger and thumb crossed": (
        "a hand with index finger and thumb crossed",
        "hand",
    ),
    "sign of the horns": ("a hand making the sign of the horns", "hand"),
    "call me hand": ("a call me hand", "hand"),
    "vulcan salute": ("a hand making a vulcan salute", "hand"),
    "love-you gesture": ("a hand making a love-you gesture", "hand"),
    "backhand index pointing left": ("a finger pointing left", "finger"),
    "backhand index pointing right": ("a finger pointing right", "finger"),
    "backhand index pointing up": ("the back of a hand with a finger pointing up", "finger"),
    "backhand index pointing down": ("a finger pointing down", "finger"),
    "index pointing up": ("an index finger pointing up", "finger"),
    "index pointing at the viewer": ("a finger pointing at the viewer", "finger"),
    "thumbs up": ("a thumbs up", "thumbs"),
    "thumbs down": ("a thumbs down", "thumbs"),
    "palms up together": ("two palms up together", "palms"),
    "nail polish": ("a hand with nail polish", "nail"),
    "selfie": ("a hand taking a selfie", "selfie"),
    "eyes": ("a pair of eyes", "eyes"),
    "older person": ("an older person", "person"),
    "person: bald": ("a bald person", "person"),
    "man: bald": ("a bald man", "man"),
    "woman: bald": ("a bald woman", "woman"),
    "person: beard": ("a person with a beard", "person"),
    "man: beard": ("a man with a beard", "man"),
    "woman: beard": ("a woman with a beard", "woman"),
    "breast-feeding": ("a woman breast-feeding a baby", "woman"),
    "horse racing": ("a jockey racing on a horse", "horse"),
    "santa claus": ("santa claus", "santa"),
    "mrs. claus": ("mrs. claus", "claus"),
    "mx claus": ("a person dressed as santa claus", "claus"),
    "couple with heart": ("a couple with a heart", "couple"),
    "person with crown": ("a person with a crown", "person"),
    "person with veil": ("a person with a veil", "person"),
    "man with veil": ("a man with a veil", "man"),
    "woman with veil": ("a woman with a veil", "woman"),
    "woman with headscarf": ("a woman with a headscarf", "woman"),
    "person with skullcap": ("a person with a skullcap", "person"),
    "person in tuxedo": ("a person in a tuxedo", "person"),
    "man in tuxedo": ("a man in a tuxedo", "man"),
    "woman in tuxedo": ("a woman in a tuxedo", "woman"),
    "person in suit levitating": ("a person in a suit levitating", "person"),
    "person taking bath": ("a person taking a bath", "person"),
    "bust in silhouette": ("a bust in silhouette", "bust"),
    "monkey face": ("the face of a monkey", "monkey"),
    "leaf fluttering in wind": ("leaves fluttering in the wind", "leaves"),
    "sheaf of rice": ("a sheaf of rice", "rice"),
    "ear of corn": ("an ear of corn", "corn"),
    "meat on bone": ("meat on a bone", "meat"),
    "cut of meat": ("a cut of meat", "meat"),
    "poultry leg": ("a poultry leg", "leg"),
    "cooking": ("a frying pan for cooking with an egg", "pan"),
    "shallow pan of food": ("a shallow pan of food", "pan"),
    "pot of food": ("a pot of food", "pot"),
    "bowl with spoon": ("a bowl with a spoon", "bowl"),
    "hot beverage": ("a hot beverage in a cup", "beverage"),
    "pouring liquid": ("a glass with liquid pouring out", "liquid"),
    "beverage box": ("a beverage box with a straw", "box"),
    "cup with straw": ("a cup with a straw", "cup"),
    "glass of milk": ("a glass of milk", "milk"),
    "bottle with popping cork": ("a bottle with a popping cork", "bottle"),
    "fork and knife": ("a fork and a knife", "fork"),
    "fork and knife with plate": ("a fork and a knife with a plate", "fork"),
    "fish cake with swirl": ("a fish cake with a swirl", "cake"),
    "globe showing europe-africa": ("a globe showing europe and africa", "globe"),
    "globe showing americas": ("a globe showing the americas", "globe"),
    "globe showing asia-australia": ("a globe showing asia and australia", "globe"),
    "map of japan": ("a map of japan", "map"),
    "camping": ("a camping tent beside a tree", "camping"),
    "beach with umbrella": ("a beach with an umbrella", "beach"),
    "building construction": ("a building under construction", "building"),
    "house with garden": ("a house with a garden", "house"),
    "foggy": ("a foggy city", "foggy"),
    "night with stars": ("a night with stars", "night"),
    "sunrise": ("a sunrise", "sunrise"),
    "sunset": ("a sunset", "sunset"),
    "bridge at night": ("a bridge at night", "bridge"),
    "wedding": ("a wedding chapel", "wedding"),
    "flag in hole": ("a golf flag in a hole", "flag"),
    "construction": ("a construction barrier", "construction"),
    "airplane departure": ("an airplane taking off", "airplane"),
    "airplane arrival": ("an airplane landing", "airplane"),
    "hourglass done": ("an hourglass that has run out", "hourglass"),
    "hourglass not done": ("an hourglass with sand running", "hourglass"),
    "sun behind cloud": ("the sun behind a cloud", "sun"),
    "sun behind small cloud": ("the sun behind a small cloud", "sun"),
    "sun behind large cloud": ("the sun behind a large cloud", "sun"),
    "sun behind rain cloud": ("the sun behind a rain cloud", "sun"),
    "sun with face": ("the sun with a face", "sun"),
    "sun": ("the sun", "sun"),
    "umbrella on ground": ("an umbrella on the ground", "umbrella"),
    "high voltage": ("a lightning bolt for high voltage", "voltage"),
    "fire": ("a fire", "fire"),
    "mount fuji": ("mount fuji", "fuji"),
    "tokyo tower": ("the tokyo tower", "tower"),
    "statue of liberty": ("the statue of liberty", "statue"),
    "kaaba": ("the kaaba", "kaaba"),
    "milky way": ("the milky way", "milky"),
    "moon viewing ceremony": ("a moon viewing ceremony", "moon"),
    "1st place medal": ("a first place medal", "medal"),
    "2nd place medal": ("a second place medal", "medal"),
    "3rd place medal": ("a third place medal", "medal"),
    "tennis": ("a tennis racket and ball", "tennis"),
    "bowling": ("a bowling ball and pins", "bowling"),
    "cricket game": ("a cricket bat and ball", "cricket"),
    "field hockey": ("a field hockey stick and ball", "hockey"),
    "ice hockey": ("an ice hockey stick and puck", "hockey"),
    "lacrosse": ("a lacrosse stick and ball", "lacrosse"),
    "ping pong": ("a ping pong paddle and ball", "pong"),
    "badminton": ("a badminton racket and shuttlecock", "badminton"),
    "american football": ("an american football", "football"),
    "rugby football": ("a rugby football", "football"),
    "pool 8 ball": ("a pool eight ball", "ball"),
    "joker": ("a joker playing card", "joker"),
    "performing arts": ("theatre masks for the performing arts", "arts"),
    "mahjong red dragon": ("a mahjong tile with a red dragon", "mahjong"),
    "bell with slash": ("a bell with a slash through it", "bell"),
    "level slider": ("a level slider", "slider"),
    "mobile phone with arrow": ("a mobile phone with an arrow", "phone"),
    "film frames": ("a strip of film frames", "film"),
    "camera with flash": ("a camera with its flash on", "camera"),
    "magnifying glass tilted left": ("a magnifying glass tilted left", "glass"),
    "magnifying glass tilted right": ("a magnifying glass tilted right", "glass"),
    "notebook with decorative cover": ("a notebook with a decorative cover", "notebook"),
    "page with curl": ("a page with a curl", "page"),
    "page facing up": ("a page facing up", "page"),
    "envelope with arrow": ("an envelope with an arrow", "envelope"),
    "closed mailbox with raised flag": ("a closed mailbox with a raised flag", "mailbox"),
    "closed mailbox with lowered flag": ("a closed mailbox with a lowered flag", "mailbox"),
    "open mailbox with raised flag": ("an open mailbox with a raised flag", "mailbox"),
    "open mailbox with lowered flag": ("an open mailbox with a lowered flag", "mailbox"),
    "ballot box with ballot": ("a ballot box with a ballot", "box"),
    "chart increasing": ("a chart with an increasing line", "chart"),
    "chart decreasing": ("a chart with a decreasing line", "chart"),
    "chart increasing with yen": ("a chart with an increasing line and a yen sign", "chart"),
    "locked": ("a locked padlock", "padlock"),
    "unlocked": ("an unlocked padlock", "padlock"),
    "locked with pen": ("a locked padlock with a pen", "padlock"),
    "locked with key": ("a locked padlock with a key", "padlock"),
    "hammer and pick": ("a hammer and a pick", "hammer"),
    "hammer and wrench": ("a hammer and a wrench", "hammer"),
    "bow and arrow": ("a bow and arrow", "bow"),
    "nut and bolt": ("a nut and bolt", "bolt"),
    "link": ("a link of chain", "link"),
    "chains": ("crossed chains", "chains"),
    "dna": ("a strand of dna", "dna"),
    "x-ray": ("an x-ray of bones", "x-ray"),
    "drop of blood": ("a drop of blood", "blood"),
    "couch and lamp": ("a couch and a lamp", "couch"),
    "roll of paper": ("a roll of paper", "paper"),
    "pile of poo": ("a pile of poo", "poo"),
    "jeans": ("a pair of jeans", "jeans"),
    "glasses": ("a pair of glasses", "glasses"),
    "sunglasses": ("a pair of sunglasses", "sunglasses"),
    "goggles": ("a pair of goggles", "goggles"),
    "skis": ("a pair of skis", "skis"),
    "lungs": ("a pair of lungs", "lungs"),
    "scissors": ("a pair of scissors", "scissors"),
    "two-hump camel": ("a camel with two humps", "camel"),
    "front-facing baby chick": ("a baby chick facing forward", "chick"),
    "american samoa": ("american samoa", "samoa"),
    "clockwise vertical arrows": ("clockwise vertical arrows", "arrows"),
    "atm sign": ("an atm sign", "atm"),
    "potable water": ("a sign for potable water", "water"),
    "non-potable water": ("a sign against drinking non-potable water", "water"),
    "litter in bin sign": ("a sign with a person putting litter in a bin", "litter"),
    "passport control": ("a sign for passport control", "passport"),
    "customs": ("a sign for customs", "customs"),
    "baggage claim": ("a sign for baggage claim", "baggage"),
    "left luggage": ("a sign for left luggage", "luggage"),
    "men's room": ("a sign for the men's room", "men's"),
    "women's room": ("a sign for the women's room", "women's"),
    "restroom": ("a sign for a restroom", "restroom"),
    "water closet": ("a sign for a water closet", "closet"),
    "warning": ("a yellow warning sign", "warning"),
    "children crossing": ("a sign for children crossing", "children"),
    "no entry": ("a no entry sign", "entry"),
    "prohibited": ("a prohibited sign", "prohibited"),
    "no bicycles": ("a sign against bicycles", "bicycles"),
    "no smoking": ("a no smoking sign", "smoking"),
    "no littering": ("a no littering sign", "littering"),
    "no pedestrians": ("a sign against pedestrians", "pedestrians"),
    "no mobile phones": ("a sign against mobile phones", "phones"),
    "no one under eighteen": ("a sign for no one under eighteen", "eighteen"),
    "radioactive": ("a radioactive sign", "radioactive"),
    "biohazard": ("a biohazard sign", "biohazard"),
    "atom symbol": ("an atom symbol", "atom"),
    "om": ("the om symbol", "om"),
    "star of david": ("a star of david", "star"),
    "yin yang": ("a yin yang symbol", "yang"),
    "star and crescent": ("a star and crescent", "star"),
    "wheel of dharma": ("a wheel of dharma", "wheel"),
    "place of worship": ("a sign for a place of worship", "worship"),
    "cinema": ("a cinema sign", "cinema"),
    "wireless": ("a wireless signal sign", "wireless"),
    "vibration mode": ("a mobile phone in vibration mode", "vibration"),
    "mobile phone off": ("a mobile phone switched off", "phone"),
    "multiply": ("a multiply sign", "multiply"),
    "plus": ("a plus sign", "plus"),
    "minus": ("a minus sign", "minus"),
    "divide": ("a divide sign", "divide"),
    "infinity": ("an infinity symbol", "infinity"),
    "wavy dash": ("a wavy dash", "dash"),
    "fleur-de-lis": ("a fleur-de-lis", "fleur-de-lis"),
    "check box with check": ("a check box with a check mark", "check"),
    "copyright": ("a copyright sign", "copyright"),
    "registered": ("a registered trade mark sign", "registered"),
    "trade mark": ("a trade mark sign", "mark"),
    "information": ("an information sign", "information"),
    "currency exchange": ("a currency exchange sign", "exchange"),
    "diamond with a dot": ("a diamond with a dot", "diamond"),
    "red triangle pointed up": ("a red triangle pointed up", "triangle"),
    "red triangle pointed down": ("a red triangle pointed down", "triangle"),
    "hairy creature": ("a hairy creature", "creature"),
    "people with bunny ears": ("people with bunny ears", "people"),
    "men with bunny ears": ("men with bunny ears", "men"),
    "women with bunny ears": ("women with bunny ears", "women"),
    "lady beetle": ("a lady beetle", "beetle"),
    "men holding hands": ("two men holding hands", "men"),
    "women holding hands": ("two women holding hands", "women"),
    "people holding hands": ("two people holding hands", "people"),
    "woman and man holding hands": ("a woman and a man holding hands", "woman"),
    "busts in silhouette": ("two busts in silhouette", "busts"),
    "fireworks": ("fireworks in the sky", "fireworks"),
    "admission tickets": ("two admission tickets", "tickets"),
    "wood": ("a log of wood", "wood"),
    "ice": ("a cube of ice", "ice"),
    "mate": ("a cup of mate", "mate"),
    "seat": ("a seat", "seat"),
    "metro": ("a metro train", "metro"),
    "station": ("a train at a station", "station"),
    "light rail": ("a light rail train", "rail"),
    "mountain railway": ("a mountain railway train", "railway"),
    "suspension railway": ("a suspension railway", "railway"),
    "motorway": ("a motorway through the land", "motorway"),
    "fog": ("fog over a city", "fog"),
    "confetti ball": ("a confetti ball", "confetti"),
    "clinking beer mugs": ("two clinking beer mugs", "mugs"),
    "clinking glasses": ("two clinking glasses", "glasses"),
}

MASS = listed(
    """
    bread butter salt rice garlic broccoli toast popcorn bacon spaghetti sushi oden dango
    custard falafel fondue food coral greenery anger sweat droplets honey cash water soap
    money underwear dice yarn thread luggage hair lightning snow mail litter sake ginseng
    curry candy pita ice paper lipstick toothpaste
    """
)
SINGULAR_S = listed(
    """
    bus cactus glass lotus octopus walrus compass virus gas platypus dress canvas cross
    hibiscus abacus hippopotamus rhinoceros cypress claus iris bass asparagus grass boss
    princess goddess mattress lens chess couscous hummus tennis news christmas stethoscope
    hyacinth trophies duchess toss press
    """
)
PLURAL = listed("people men women children feet teeth geese mice dice leaves skis jeans")
PERSON = "(?:person|man|woman|people|men|women)"
VERB = re.compile(rf"^({PERSON}) (\w+ing)\b")
CUT = re.compile(
    r" (?:with|without|of|on|in|at|behind|showing|holding|facing|pointing|and|over|for|from) "
)
# In "cow face" it is the cow that a caption must name.
HAS_A_FACE = listed("cat cow dog dragon horse monkey moon mouse pig rabbit tiger")
WITH = re.compile(
    r"(with|without) (arrow|ribbon|halo|tear|wry|thermometer|medical|head-bandage|monocle|raised"
    r"|diagonal|open mouth|peeking|mouth|handle|hearing)\b"
)
TAIL_VERB = listed("savoring blowing exhaling vomiting holding screaming feeding wearing")


def article(phrase: str) -> str:
    """Put "a" or "an" before a phrase."""
    first = phrase.split()[0]
    vowel = first[0] in "aeiou" and not re.match(r"(uni|use|ufo|ewe|eu|one)", first)
    return f"{'an' if vowel or first == 'sos' else 'a'} {phrase}"


def is_bare(noun: str) -> bool:
    """Say whether a noun takes no article: a plural or a mass noun."""
    if noun in MASS or noun in PLURAL:
        return True
    return noun.endswith("s") and not noun.endswith(("ss", "bus")) and noun not in SINGULAR_S


def clean(label: str) -> str:
    """Lower the case of a label and drop its brackets, curly quotes and colons' spacing."""
    text = (
        label.lower()
        .replace("\u2019", "'")
        .replace("\u201c", "")
        .replace("\u201d", "")
        .replace("!", "")
    )
    return re.sub(r"\s+", " ", re.sub(r"\(.*?\)", "", text)).strip()


def describe(label: str) -> tuple[str, str]:
    """Turn an emoji's label into a caption and its head noun.

    Args:
        label: emojibase's English label, such as "red apple" or "flag: Japan".

    Returns:
        The caption ("a red apple") and the word of it that names the thing ("apple").
    """
    known = IRREGULAR.get(label.lower()) or IRREGULAR.get(clean(label))
    if known:
        return known
    text = clean(label)
    if text.startswith("flag: "):
        name = text[6:].replace("&", "and").replace("st. ", "saint ")
        the = (
            "the "
            if re.search(
                r"\b(united|islands|netherlands|republic|bahamas|philippines|maldives)\b", name
            )
            else ""
        )
        return f"the flag of {the}{name}", "flag"
    if text.startswith("keycap: "):
        return f"a keycap with the sign {text[8:]}", "keycap"
    if "o'clock" in text or "-thirty" in text:
        return f"a clock showing {text.replace('-', ' ')}", "clock"
    right = text.endswith(": facing right")
    text = text.removesuffix(": facing right")
    if match := re.fullmatch(rf"({PERSON}|couple|kiss|family): (.*)", text):
        who, what = match.groups()
        if "hair" in what:
            return f"{article(who)} with {what}", who
        names = [article(part) for part in what.split(", ")]
        listed = " and ".join([", ".join(names[:-1]), names[-1]] if names[1:] else names)
        return f"a {who} with {listed}", who
    if match := VERB.match(text):
        noun = match.group(1)
        text = re.sub(r"getting (massage|haircut)", r"getting a \1", text)
        text = re.sub(
            r"(rowing) boat|(tipping|raising) hand|(wearing) turban|(bouncing) ball|(feeding) baby",
            add_a,
            text,
        )
        caption = text if noun in PLURAL else article(text)
        caption = re.sub(r"gesturing (no|ok)", r"gesturing \1", caption)
        return caption + (" to the right" if right else ""), noun
    if match := re.match(
        rf"({PERSON}) (in|with) (motorized|manual|white|lotus|steamy|bed)(.*)", text
    ):
        noun, prep, first, rest = match.groups()
        the = "" if first == "bed" else "the " if first == "lotus" else "a "
        return f"{article(noun)} {prep} {the}{first}{rest}" + (
            " facing right" if right else ""
        ), noun
    core = CUT.split(text)[0]
    words = core.split()
    for index, word in enumerate(words):
        if index and word in TAIL_VERB:
            words = words[:index]
            break
    noun = words[-1].strip(",.")
    if noun == "face" and len(words) > 1 and words[-2] in HAS_A_FACE:
        noun = words[-2]
    text = WITH.sub(lambda found: f"{found.group(1)} {article(found.group(2))}", text)
    return (text if is_bare(noun) else article(text)), noun


def add_a(match: re.Match[str]) -> str:
    """Write the article into "raising hand"."""
    verb, thing = match.group(0).split()
    return f"{verb} {article(thing)}"


def captions(caption: str, noun: str, tags: list[str], subgroup: str) -> list[str]:
    """Write one to three captions of a picture.

    Args:
        caption: the plain caption.
        noun: its head noun.
        tags: emojibase's tags.
        subgroup: emojibase's subgroup, such as "food-fruit".

    Returns:
        The caption; with the kind of thing, unless it says so; with one or two telling tags.
    """
    out = [caption]
    said = set(re.findall(r"[a-z]+", caption))
    kind = KINDS.get(subgroup, "")
    if kind and noun not in NOT_OF_ITS_KIND and not set(kind.split()[-1:]) & said:
        out.append(f"{caption}, {kind}")
        said |= set(re.findall(r"[a-z]+", kind))
    telling = [
        tag for tag in tags if tag in TELLING and not any(tag[:4] == word[:4] for word in said)
    ][:2]
    if telling and "flag" not in subgroup:
        out.append(f"{caption}, {' and '.join(telling)}")
    return out
