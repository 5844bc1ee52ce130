"""Words of the embedded model: things with their drawings and synonyms, styles, colours, sizes, places and backgrounds.

A drawing is named as in the packs, by its Unicode short name. Things whose drawings differ between the packs, and
things that are hard to tell apart, are left out.
"""

from __future__ import annotations

from typing import TypeAlias

Color: TypeAlias = tuple[float, float, float]

# Drawing and synonyms of each thing; the name comes first in captions, the synonyms are rarer.
_THINGS = """
cat cat-face: kitty, kitten
dog dog-face: puppy, doggy
fox fox
lion lion
tiger tiger-face
bear bear: brown bear
panda panda: panda bear
koala koala: koala bear
wolf wolf
raccoon raccoon
rabbit rabbit-face: bunny, hare
mouse mouse-face
pig pig-face: piglet, hog
cow cow-face
horse horse-face: pony
unicorn unicorn
monkey monkey-face: ape
frog frog: toad
elephant elephant
giraffe giraffe
camel camel
zebra zebra
hedgehog hedgehog
squirrel chipmunk: chipmunk
bat bat
turtle turtle: tortoise
snake snake: serpent
crocodile crocodile: alligator
dragon dragon
dinosaur sauropod: sauropod
rooster rooster: cock
chick baby-chick: baby chicken
penguin penguin
eagle eagle: hawk
duck duck: mallard
swan swan
owl owl
flamingo flamingo
peacock peacock
parrot parrot
bird bird: songbird
whale spouting-whale
dolphin dolphin
fish fish
shark shark
octopus octopus: kraken
crab crab
lobster lobster
jellyfish jellyfish
snail snail
butterfly butterfly: moth
caterpillar bug
ant ant
bee honeybee: honeybee, bumblebee
ladybug lady-beetle: ladybird
spider spider: tarantula
rose rose
sunflower sunflower
tulip tulip
hibiscus hibiscus
flower blossom: daisy, blossom
cactus cactus
fir evergreen-tree: pine, fir tree, pine tree
tree deciduous-tree: oak
palm palm-tree: palm tree
mushroom mushroom: toadstool
potted_plant potted-plant: plant, houseplant
apple red-apple
pear pear
lemon lemon
banana banana
watermelon watermelon
grapes grapes: bunch of grapes
strawberry strawberry
cherries cherries: cherry
pineapple pineapple
tomato tomato
eggplant eggplant: aubergine
avocado avocado
broccoli broccoli
carrot carrot
corn ear-of-corn: maize
chili hot-pepper: hot pepper, chili pepper
bread bread: loaf
croissant croissant
pretzel pretzel
pancakes pancakes: stack of pancakes
cheese cheese-wedge: piece of cheese
burger hamburger: hamburger, cheeseburger
fries french-fries: french fries, chips
pizza pizza: slice of pizza
hot_dog hot-dog: hotdog, sausage
taco taco
egg egg
popcorn popcorn
ice_cream soft-ice-cream: ice cream cone, soft ice
doughnut doughnut: donut
cookie cookie: biscuit
cake birthday-cake: birthday cake
cupcake cupcake: muffin
chocolate chocolate-bar: chocolate bar
lollipop lollipop: lolly
honey honey-pot: honey pot
coffee hot-beverage: cup of coffee, cup, tea
teapot teapot: kettle
beer beer-mug: mug of beer, beer mug
drink cup-with-straw: soda, lemonade
car automobile: sedan, automobile
taxi taxi: cab
police_car police-car
fire_truck fire-engine: fire engine
tractor tractor
motorcycle motorcycle: motorbike
bicycle bicycle: bike
train locomotive: locomotive, steam train
sailboat sailboat: sailing boat, boat
ship ship: cruise ship, steamer
airplane airplane: plane, aeroplane, jet
helicopter helicopter: chopper
rocket rocket: spaceship
ufo flying-saucer: flying saucer
anchor anchor
skateboard skateboard
house house: home, cottage
castle castle: palace
tent tent
church church: chapel
volcano volcano
mountain mountain
ferris_wheel ferris-wheel: big wheel
sun sun
moon crescent-moon: crescent moon, crescent
cloud cloud
rainbow rainbow
umbrella umbrella: parasol
snowflake snowflake
snowman snowman
fire fire: flame, campfire
drop droplet: water drop, droplet
lightning high-voltage: lightning bolt, bolt
planet ringed-planet: saturn
earth globe-showing-americas: globe, world
balloon balloon
gift wrapped-gift: present, gift box
pumpkin jack-o-lantern: jack o lantern, halloween pumpkin
christmas_tree christmas-tree: xmas tree
trophy trophy: prize cup
soccer_ball soccer-ball: football
basketball basketball
crystal_ball crystal-ball
die game-die: dice
puzzle puzzle-piece: puzzle piece, jigsaw
teddy teddy-bear: teddy bear
palette artist-palette: paint palette
gamepad video-game: game controller, controller
target bullseye: dartboard, bullseye
bow ribbon: ribbon
hat top-hat: top hat
crown crown
graduation_cap graduation-cap: mortarboard
cap billed-cap: baseball cap
glasses glasses: spectacles, eyeglasses
sunglasses sunglasses: shades
shirt t-shirt: t-shirt, tee
jeans jeans: pants, trousers
scarf scarf
dress dress: gown
high_heel high-heeled-shoe: heel, stiletto
shoe running-shoe: sneaker, running shoe
backpack backpack: rucksack
handbag handbag: bag
diamond gem-stone: gem, jewel
bell bell
guitar guitar: electric guitar
violin violin: fiddle
trumpet trumpet
saxophone saxophone: sax
drum drum
microphone microphone: mic
phone mobile-phone: mobile phone, smartphone
laptop laptop: computer, notebook
camera camera
tv television: television
light_bulb light-bulb: bulb, lamp
candle candle
books books: stack of books
book closed-book
envelope envelope: letter, mail
pencil pencil
brush paintbrush: paintbrush
scissors scissors
key key
hammer hammer
axe axe: hatchet
wrench wrench: spanner
shield shield
bomb bomb
magnet magnet
alarm_clock alarm-clock: clock
watch watch: wristwatch
hourglass hourglass-done: sandglass
lock locked: padlock
broom broom: broomstick
chair chair: stool
door door
coin coin: gold coin
gear gear: cogwheel, cog
"""

SHAPES = ("circle", "square", "triangle", "star")
SHAPE_SYNONYMS = {"circle": ("disc",), "square": ("box",), "triangle": (), "star": ()}


def _parse(table: str) -> dict[str, tuple[str, tuple[str, ...]]]:
    things = {}
    for line in table.strip().splitlines():
        names, _, synonyms = line.partition(":")
        name, drawing = names.split()
        words = tuple(word.strip() for word in synonyms.split(",") if word.strip())
        things[name.replace("_", " ")] = (drawing, words)
    return things


_TABLE = _parse(_THINGS)

# Name of the drawing of each thing, in all packs.
DRAWINGS = {name: drawing for name, (drawing, _) in _TABLE.items()}
# Words for each thing, the most usual one first. The four shapes are things too.
SYNONYMS = {name: (name, *words) for name, (_, words) in _TABLE.items()} | {
    name: (name, *words) for name, words in SHAPE_SYNONYMS.items()
}
THINGS = tuple(SYNONYMS)

# Things that the decoder draws, those that are easiest to tell apart, beside the shapes. CLIP knows all of them.
_DRAWN = """
cat, dog, fox, lion, bear, panda, koala, rabbit, mouse, pig, cow, horse, unicorn, monkey, frog, elephant, turtle, snake,
dragon, dinosaur, chick, penguin, duck, owl, flamingo, bird, whale, dolphin, fish, octopus, crab, snail, butterfly, bee,
ladybug, spider, rose, sunflower, tulip, cactus, fir, tree, palm, mushroom, apple, pear, lemon, banana, watermelon,
grapes, strawberry, cherries, pineapple, tomato, carrot, corn, bread, cheese, burger, fries, pizza, egg, ice cream,
doughnut, cookie, cake, cupcake, coffee, car, fire truck, tractor, bicycle, train, sailboat, ship, airplane, helicopter,
rocket, ufo, anchor, house, castle, tent, volcano, mountain, sun, moon, cloud, rainbow, umbrella, snowflake, snowman,
fire, drop, lightning, planet, balloon, gift, pumpkin, christmas tree, trophy, soccer ball, die, teddy, gamepad, target,
bow, hat, crown, glasses, shirt, dress, shoe, backpack, diamond, bell, guitar, trumpet, drum, phone, laptop, camera, tv,
light bulb, candle, book, envelope, pencil, scissors, key, hammer, shield, alarm clock, hourglass, lock, chair, door,
coin, gear
"""
DRAWN_THINGS = tuple(" ".join(name.split()) for name in _DRAWN.split(","))

# Things of so many colours that a colour word would not say what changes.
NATURAL_ONLY = frozenset({"rainbow", "palette", "earth", "snowflake", "bomb"})

STYLES = ("flat", "3D", "cartoon", "sticker")
# The npm package whose drawings have each style.
STYLE_PACKS = {
    "flat": "@iconify-json/fluent-emoji-flat",
    "3D": "@iconify-json/fluent-emoji",
    "cartoon": "@iconify-json/noto",
    "sticker": "@iconify-json/twemoji",
}
STYLE_WORDS = {
    "flat": ("flat", "flat", "minimal", "simple"),
    "3D": ("3D", "3D", "soft 3D", "glossy"),
    "cartoon": ("cartoon", "cartoon", "comic"),
    "sticker": ("sticker", "sticker", "clip art"),
}

# RGB in [0, 1] of plain backgrounds, and of what a recoloured thing mostly consists of.
COLORS: dict[str, Color] = {
    "red": (0.86, 0.17, 0.20),
    "orange": (0.96, 0.52, 0.11),
    "yellow": (0.99, 0.82, 0.22),
    "green": (0.22, 0.66, 0.34),
    "blue": (0.16, 0.45, 0.87),
    "purple": (0.53, 0.30, 0.78),
    "pink": (0.98, 0.56, 0.75),
    "brown": (0.52, 0.34, 0.22),
    "black": (0.12, 0.12, 0.15),
    "white": (0.96, 0.96, 0.95),
}
NATURAL = "natural"
THING_COLORS = (NATURAL, *COLORS)

PAINTED_SCENES = ("meadow", "sea", "night", "desert", "snow", "room")
PAINTED_PHRASES = {
    "meadow": ("in a meadow", "in a meadow", "on a green meadow", "in the grass", "on a hill"),
    "sea": ("at the sea", "at the sea", "by the sea", "on the beach", "at the ocean"),
    "night": ("at night", "at night", "under the stars", "in the night", "under a starry sky"),
    "desert": ("in the desert", "in the desert", "in a desert", "on the sand"),
    "snow": ("in the snow", "in the snow", "in a snowy landscape", "in winter"),
    "room": ("in a room", "in a room", "in the house", "indoors"),
}
PLAIN, GRADIENT = "plain", "gradient"
# Each background is a kind and a colour, or the name of a painted scene.
BACKGROUNDS = (
    *((PLAIN, color) for color in COLORS),
    *((GRADIENT, color) for color in COLORS),
    *(("painted", scene) for scene in PAINTED_SCENES),
)

SIZES = ("small", "medium", "large")
SIZE_WORDS = {"small": ("small", "small", "little", "tiny"), "large": ("large", "big", "big", "huge")}
POSITIONS = ("center", "left", "right", "top", "bottom")
POSITION_PHRASES = {
    "center": ("in the center", "in the center", "in the middle", "at the center", "in the centre"),
    "left": ("on the left", "on the left", "on the left side", "at the left"),
    "right": ("on the right", "on the right", "on the right side", "at the right"),
    "top": ("at the top", "at the top", "in the upper half", "on the upper side"),
    "bottom": ("at the bottom", "at the bottom", "in the lower half", "on the lower side"),
}
ARRANGEMENTS = ("beside", "above", "on", "front", "row")
RELATION_PHRASES = {
    "left of": ("left of", "to the left of", "to the left of", "on the left of"),
    "right of": ("right of", "to the right of", "to the right of", "on the right of"),
    "beside": ("next to", "beside"),
    "above": ("above", "above", "over"),
    "below": ("below", "below", "under", "beneath"),
    "on": ("on", "on", "on top of", "sitting on"),
    "front": ("in front of", "in front of"),
    "behind": ("behind", "behind"),
}
