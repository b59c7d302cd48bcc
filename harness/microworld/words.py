"""The vocabulary of the small world: every name and value that a generated text can contain.

Lists, not logic. Their order is part of the world's definition: `world.py` draws from them with a seed, so that a
changed list is a changed world and needs a newly pre-trained model.
"""

WOMEN = tuple(
    "Ada Alma Amy Anna Beth Carla Clara Daisy Dora Edith Ella Emma Eva Fay Flora Gina Grace Hanna Helen Hilda Ida Irene "
    "Iris Jane Joan Julia Kate Laura Lena Lily Lucy Mary".split()
)
MEN = tuple(
    "Adam Alan Albert Ben Bruno Carl Dan David Eric Ernest Felix Frank Fred George Harry Henry Hugo Ivan Jack Jacob James "
    "Joel Karl Leo Louis Luke Mark Martin Max Oscar Otto Paul".split()
)
LAST_NAMES = tuple(
    "Abbot Archer Ash Bailey Baker Barnes Bell Berry Bishop Black Blake Bond Brooks Burns Carter Chase Cole Cook Cross "
    "Dale Dean Dixon Drake Ellis Field Fisher Fleming Ford Foster Fox Gibson Grant Gray Green Hall Harper Hayes Hill Holt "
    "Hunt Kent King Lamb Lane Long Marsh Mason Miller Moore Nash Page Parker Pearce Porter Reed Rose Shaw Stone Swift "
    "Turner Wade Walker Ward West".split()
)

CITIES = tuple(
    "Alden Barrow Belmont Brighton Calder Carlow Clifton Corby Dalton Denby Dover Elgin Fairfax Galway Hadley Harwick Hilton "
    "Kendal Lydford Malden Milton Norwood Oakham Preston Redhill Selby Stanton Thorpe Upton Welford Weston Yarmouth".split()
)
REGIONS = (
    "the north",
    "the south",
    "the east",
    "the west",
    "the hills",
    "the valley",
    "the coast",
    "the islands",
)
RIVERS = tuple("Arrow Bourne Derwent Eden Kennet Lark Medway Severn Tamar Thames Trent Wye".split())
WEATHER = tuple("rain snow fog wind sun storms frost clouds".split())
INDUSTRIES = tuple("glass wool paper bricks clocks ships boots carpets pottery rope salt soap".split())

JOBS = tuple(
    "baker barber butcher carpenter chemist clerk cook dentist doctor driver farmer fireman gardener guard hunter judge "
    "lawyer mechanic miner nurse painter pilot plumber poet porter sailor singer soldier tailor teacher waiter writer".split()
)
TOOLS = tuple(
    "oven razor cleaver plane flask stamp ladle drill needle wheel plough hose spade torch rifle gavel "
    "contract wrench pickaxe bandage brush compass pipe quill trolley sail microphone helmet thimble chalk tray pen".split()
)
WORKPLACES = tuple("shop office kitchen street field hospital court school harbour workshop theatre station".split())

ANIMALS = tuple(
    "ant bat bear bee beaver cat cow crab crow deer dog donkey duck eagle fox frog goat goose hamster hare horse lizard mouse "
    "otter owl parrot pig pigeon rabbit sheep snail turtle".split()
)
DIETS = tuple("grass seeds fish leaves insects meat roots berries".split())
HABITATS = tuple("forest river meadow desert barn cave marsh garden mountain lake".split())
SOUNDS = tuple("barks hums squeaks growls whistles clicks hisses roars".split())

FOODS = tuple(
    "apples bacon bananas beans bread butter cabbage cake carrots cheese cherries corn eggs grapes ham honey jam lemons lentils "
    "mushrooms nuts olives onions pasta peaches pears peas pie plums porridge potatoes rice".split()
)
TASTES = tuple("sweet sour salty bitter mild spicy".split())
STORES = tuple("cellar pantry barrel jar basket cupboard crate drawer".split())

HOBBIES = tuple(
    "archery boxing camping chess climbing cricket cycling dancing darts diving drawing fencing fishing golf hiking juggling "
    "knitting opera painting photography poker pottery puzzles reading rowing running sailing sewing skating skiing swimming "
    "tennis".split()
)
SEASONS = tuple("spring summer autumn winter".split())
DAYS = tuple("Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split())

THINGS = tuple(
    "anchor bag ball barrow basin bell belt bench blanket boat book bottle bowl box bracelet bridge bucket button cabin camera "
    "candle cane cap carpet cart chain chair chest clock coat coin comb cradle crown cup curtain desk dice doll door drum fan "
    "fence flag flute fork frame gate glove guitar hammer handle harp hat hinge hook horn jacket jug kettle key kite knife ladder "
    "lamp lantern lid lock magnet map mask mat mirror mug nail necklace net oar organ pan pen piano pillow pin plate plug pot "
    "purse rake raft ribbon ring robe rug saddle sandal saw scale scarf shelf shield shoe shovel sign skirt sled soap sofa spoon "
    "stamp statue stool stove sword table tent thread tile towel toy tube vase violin wagon wallet watch whistle window "
    "wreath".split()
)
MATERIALS = tuple("wood iron copper glass wool leather paper silver stone clay cotton rubber".split())
ROOMS = tuple("attic bathroom bedroom cellar garage garden hall kitchen library nursery office stable".split())
USES = tuple(
    "cooking cleaning building playing travelling resting working dressing storing measuring drawing farming".split()
)
COLOURS = tuple("red blue green yellow black white brown grey purple orange".split())

ACTIVITIES = tuple(
    "Baking bread|Fixing a bike|Washing clothes|Planting trees|Painting a wall|Making soup|Cleaning a car|Feeding birds|"
    "Building a fire|Sewing a shirt|Writing a letter|Catching fish|Picking apples|Making tea|Cutting hair|Walking a dog|"
    "Milking cows|Digging a well|Packing a bag|Opening a shop|Closing a shop|Making candles|Mending a net|Riding a horse|"
    "Sailing a boat|Setting a table|Selling eggs|Teaching a class|Sweeping a floor|Chopping wood|Drying herbs|Making jam|"
    "Moving house|Buying shoes|Playing chess|Climbing a hill|Visiting a friend|Guarding a gate|Mixing paint|Shearing sheep|"
    "Hanging a picture|Repairing a roof|Carving a spoon|Cooking rice|Weaving a basket|Tuning a piano|Lighting a lamp|"
    "Tying a knot".split("|")
)
EVENTS = tuple(
    "opens the window|picks up a basket|looks at the sky|puts on a coat|fills a bucket|washes both hands|reads a short note|"
    "sits on a bench|calls a neighbour|lights a candle|counts the coins|ties a rope|walks to the river|closes the door|"
    "cuts a piece of string|sweeps the step|pours some water|sharpens a knife|checks the clock|lifts a heavy box|"
    "draws a small map|turns the wheel|moves the ladder|waits for an hour|stirs the pot|folds a cloth|rings a bell|"
    "drinks a cup of tea|carries the wood|measures the table|hangs up a lamp|drops a stone|writes down a number|"
    "takes off the gloves|digs a hole|knocks on the gate|shakes the blanket|rolls up the carpet|gathers the leaves|"
    "mixes the powder|cleans the brush|opens a jar|ties both shoes|looks for the key|wipes the glass|sings a song|"
    "warms the oven|takes a deep breath|packs the tools|crosses the road|locks the chest|spreads the net|rests under a tree|"
    "feeds the hens|turns off the light|pays the driver|throws away the paper|climbs the stairs|holds the handle|"
    "thanks the helper|smells the flowers|tests the weight|marks the wall|bends the wire".split("|")
)

MOODS = tuple(
    "was tired|was happy|felt cold|was in a hurry|was hungry|felt shy|was late|was thirsty|felt brave|was bored".split(
        "|"
    )
)

# (frame, two reasons that fit the first person {a}, two that fit the second person {b})
QUARRELS = (
    ("{a} gave the {t} to {b} because", ("had two of them", "was generous"), ("needed one", "asked for it")),
    ("{a} borrowed the {t} from {b} because", ("had lost one", "was in need"), ("had a spare", "was kind")),
    (
        "{a} sold the {t} to {b} because",
        ("needed money", "was moving away"),
        ("paid well", "wanted a bargain"),
    ),
    (
        "{a} hid the {t} from {b} because",
        ("was planning a surprise", "was selfish"),
        ("was nosy", "broke things"),
    ),
    ("{a} stole the {t} from {b} because", ("was a thief", "felt greedy"), ("was asleep", "was careless")),
    (
        "{a} carried the {t} for {b} because",
        ("was strong", "had free hands"),
        ("was tired", "had a sore back"),
    ),
    (
        "{a} showed the {t} to {b} because",
        ("was proud of it", "liked to boast"),
        ("was curious", "had never seen one"),
    ),
    (
        "{a} repaired the {t} for {b} because",
        ("had the tools", "was skilled"),
        ("was clumsy", "had no tools"),
    ),
    ("{a} threw the {t} at {b} because", ("was angry", "lost patience"), ("was rude", "told lies")),
    (
        "{a} bought the {t} from {b} because",
        ("wanted a present", "had saved up"),
        ("ran the shop", "offered it cheaply"),
    ),
    (
        "{a} sent the {t} to {b} because",
        ("had promised it", "kept a promise"),
        ("lived far away", "had ordered it"),
    ),
    (
        "{a} kept the {t} away from {b} because",
        ("was worried", "was careful"),
        ("was a child", "might break it"),
    ),
    (
        "{a} taught {b} about the {t} because",
        ("was an expert", "knew a lot"),
        ("was a beginner", "wanted to learn"),
    ),
    (
        "{a} thanked {b} for the {t} because",
        ("was grateful", "was polite"),
        ("had been helpful", "had brought it"),
    ),
    (
        "{a} asked {b} about the {t} because",
        ("was confused", "did not know"),
        ("was wise", "knew the answer"),
    ),
    ("{a} followed {b} to the {t} because", ("was lost", "felt lonely"), ("knew the way", "led the group")),
)
