"""What generated people are called, and what their attributes may be.

Every answer of an attribute is as likely as any other, so a fact about a person holds exactly
log2(answers) bits. No name occurs in an answer or the other way round.
"""

from collections.abc import Sequence
from datetime import date, timedelta


def _words(text: str) -> list[str]:
    return text.split()


def _phrases(text: str) -> list[str]:
    return [" ".join(phrase.split()) for phrase in text.split(";")]


FIRST_NAMES = _words("""
Aaron Abigail Ada Adele Adrian Agnes Aidan Alan Albert Alexa Alfred Alice Alison Alma Alvin Amanda
Amber Amelia Amos Amy Andrea Andrew Angela Anita Anna Anthony Ariel Arlene Arnold Arthur Audrey
Barbara Basil Beatrice Benjamin Bernard Bertha Beth Bianca Boris Brenda Brian Bridget Bruno Camilla
Carl Carmen Caroline Cecil Celia Charles Chloe Clara Claire Clement Clifford Colin Conrad Cora Craig
Cynthia Cyril Daisy Daniel Daphne David Deborah Denis Diana Dominic Donald Dora Doris Douglas Duncan
Edgar Edith Edmund Edward Eileen Elaine Eleanor Eli Elliot Elsa Emil Emma Enid Eric Ernest Esther
Ethan Eugene Evelyn Ezra Faith Felix Fiona Flora Frances Frank Freda Gabriel Gavin George Gerald
Gilbert Gina Gloria Gordon Grace Graham Greta Gustav Hannah Harold Harriet Harvey Hazel Hector Helen
Henry Herbert Hilda Howard Hubert Hugo Ian Ida Imogen Ingrid Irene Iris Irving Isaac Isabel Ivan
Jacob James Janet Jasper Jeremy Jessica Joan Joel Jonas Joseph Joyce Judith Julian Karen Katherine
Keith Kenneth Kurt Lara Laura Laurence Leah Leonard Leslie Lewis Lilian Linda Lionel Lloyd Louis
Lucas Lucy Luther Lydia Mabel Malcolm Marcus Margaret Maria
""")

MIDDLE_NAMES = _words("""
Marion Mark Martha Martin Maud Maurice Max Megan Melanie Mercy Michael Mildred Miles Minna Miriam
Molly Monica Morris Muriel Myra Nadia Naomi Nathan Neil Nell Nicholas Nigel Nina Noah Noel Nora Oleg
Olga Oliver Olive Opal Oscar Otto Owen Pamela Patrick Paula Pearl Penelope Percy Peter Philip Phoebe
Quentin Rachel Ralph Ramona Raymond Rebecca Reuben Rex Rhoda Richard Robert Robin Roger Roland Rosa
Rufus Rupert Ruth Sabina Sally Samuel Sandra Saul Seth Sheila Simon Sonia Stella Stephen Susan Sybil
Sylvia Tabitha Thea Thelma Theodore Thomas Timothy Tobias Una Ursula Valerie Vera Vernon Vincent
Viola Walter Wanda Wendy Wilbur
""")

LAST_NAMES = [
    beginning + ending
    for beginning in _words("""
    Ash Beck Black Brad Bram Cald Chat Cross Dal East Ever Fair Gold Green Hal Hart Hol King Lang
    Lock Marl Nor Oak Red Thorn
    """)
    for ending in _words("""
    bury by combe den field ford gate ham hurst land ley low man more shaw smith stead stone
    well worth
    """)
]

CITIES = _phrases("""
Accra;Adelaide;Algiers;Amsterdam;Ankara;Antwerp;Athens;Atlanta;Auckland;Baghdad;Baku;Bamako;
Bangkok;Barcelona;Basel;Beijing;Beirut;Belfast;Belgrade;Berlin;Bilbao;Bogota;Bologna;Bonn;Bordeaux;
Boston;Bratislava;Bremen;Brisbane;Bristol;Brussels;Bucharest;Budapest;Buenos Aires;Buffalo;Cairo;
Calgary;Canberra;Caracas;Cardiff;Casablanca;Chennai;Chicago;Cincinnati;Cleveland;Cologne;Colombo;
Copenhagen;Cork;Dakar;Dallas;Damascus;Davao;Delhi;Denver;Detroit;Dhaka;Dresden;Dubai;Dublin;Dundee;
Durban;Dusseldorf;Edinburgh;Edmonton;Essen;Florence;Frankfurt;Fukuoka;Gdansk;Geneva;Genoa;Ghent;
Glasgow;Graz;Guadalajara;Guayaquil;Halifax;Hamburg;Hanoi;Harare;Havana;Helsinki;Hiroshima;Hobart;
Houston;Hyderabad;Incheon;Indianapolis;Istanbul;Izmir;Jakarta;Jeddah;Johannesburg;Kabul;Kampala;
Kampong Cham;Karachi;Kathmandu;Kharkiv;Kiev;Kigali;Kinshasa;Kobe;Kolkata;Krakow;Kuala Lumpur;Kumasi;
Kyoto;La Paz;Lagos;Lahore;Leeds;Leipzig;Lille;Lima;Linz;Lisbon;Liverpool;Ljubljana;Luanda;Lusaka;
Lyon;Madrid;Malaga;Malmo;Manchester;Manila;Maputo;Maracaibo;Marrakesh;Marseille;Medellin;Melbourne;
Memphis;Mexico City;Miami;Milan;Milwaukee;Minneapolis;Minsk;Mombasa;Monterrey;Montevideo;Montreal;
Moscow;Mumbai;Munich;Nagoya;Nairobi;Nantes;Naples;Nashville;Nice;Nuremberg;Odessa;Osaka;Oslo;Ottawa;
Oulu;Palermo;Panama City;Paris;Perth;Philadelphia;Phoenix;Pisa;Pittsburgh;Portland;Porto;Poznan;
Prague;Pretoria;Pune;Quebec;Quito;Rabat;Reykjavik;Riga;Rome;Rotterdam;Sacramento;Salzburg;San Diego;
San Jose;Santiago;Santo Domingo;Sapporo;Sarajevo;Seattle;Seoul;Seville;Shanghai;Sheffield;Shenzhen;
Singapore;Skopje;Sofia;Stockholm;Strasbourg;Stuttgart;Surabaya;Sydney;Szeged;Taipei;Tallinn;Tampere;
Tashkent;Tbilisi;Tehran;Tirana;Tokyo;Toledo;Toronto;Toulouse;Trieste;Tripoli;Tunis;Turin;Turku;
Utrecht;Valencia;Vancouver;Varna;Venice;Vienna;Vilnius;Warsaw;Wellington;Winnipeg;Wroclaw;Wuhan;
Yaounde;Yerevan;Yokohama;Zagreb;Zaragoza;Zurich
""")

MAJORS = _phrases("""
accounting;acoustics;actuarial science;aerospace engineering;agronomy;algebra;anatomy;animation;
anthropology;archaeology;architecture;art history;astronomy;bacteriology;ballet;banking;
biochemistry;biophysics;botany;cartography;ceramics;chemistry;choreography;cinema;
civil engineering;classics;climatology;comparative literature;computer science;conducting;
criminology;cryptography;dentistry;dietetics;drama;ecology;economics;education;electronics;
entomology;epidemiology;ethics;ethnography;fashion design;fisheries;folklore;forensics;forestry;
gender studies;genetics;geodesy;geology;geometry;geophysics;gerontology;glaciology;graphic design;
heraldry;horticulture;hydrology;immunology;industrial design;insurance;jazz;journalism;
jurisprudence;landscape design;linguistics;logic;logistics;marine biology;marketing;
materials science;mechanics;medicine;metallurgy;meteorology;microbiology;midwifery;mineralogy;
museum studies;musicology;navigation;neuroscience;numismatics;nursing;nutrition;oceanography;
optics;ornithology;paleontology;pathology;pedagogy;pharmacy;philology;philosophy;phonetics;
photography;physics;physiology;political science;psychology;public health;robotics;rhetoric;
sculpture;seismology;semiotics;sociology;statistics;surgery;surveying;taxation;textile design;
theology;thermodynamics;topology;toxicology;translation;urban planning;veterinary science;
virology;viticulture;zoology
""")

TOWNS = [
    beginning + ending
    for beginning in _words("Aval Briar Clar Drake Elder Glen Juniper Mel Pem Silver Tarn Wick")
    for ending in _words("brook crest dale haven mere mont ridge ville")
]
UNIVERSITIES = [
    pattern.format(town)
    for town in TOWNS
    for pattern in ("University of {}", "{} State University", "{} Institute of Technology")
]
EMPLOYERS = [
    f"{name} {trade}"
    for name in _words("""
    Acumen Arcadia Atlas Aurora Axiom Beacon Borealis Bramble Cascade Cobalt Comet Copper Crescent
    Delta Dynamo Echo Ember Equinox Falcon Fathom Fulcrum Galleon Granite Harbor Helix Horizon
    Hydra Indigo Juno Keystone Lantern Lattice Lumen Lyra Magnet Meridian Mosaic Nebula Nimbus
    Nova Obelisk Onyx Orbit Origin Osprey Palisade Pinnacle Prism Quarry Quartz Sable Sequoia
    """)
    for trade in _words("Airlines Foods Instruments Motors Pharmaceuticals Software")
]

MONTHS = _words("""
January February March April May June July August September October November December
""")
FIRST_BIRTHDAY = date(1900, 1, 1)
LAST_BIRTHDAY = date(1999, 12, 31)


def _birth_dates() -> list[str]:
    days = (LAST_BIRTHDAY - FIRST_BIRTHDAY).days + 1
    born = (FIRST_BIRTHDAY + timedelta(days=day) for day in range(days))
    # not strftime: it would speak the language of the machine
    return [f"{day.day} {MONTHS[day.month - 1]} {day.year}" for day in born]


ANSWERS: dict[str, Sequence[str]] = {
    "person_birth_date": _birth_dates(),
    "person_birth_place": CITIES,
    "person_university": UNIVERSITIES,
    "person_major": MAJORS,
    "person_employer": EMPLOYERS,
    "person_work_city": CITIES,
}
