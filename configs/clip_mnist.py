"""A small CLIP on handwritten digits with captions in five languages.

Command:   flax-transformers train clip_mnist --workdir runs/clip_mnist \\
               --data.source.path MNIST
           where MNIST is the folder that contains train-images-idx3-ubyte.gz and the other files
Hardware:  2 CPU cores, 5 to 6 minutes (measured while other jobs ran)
Expected:  zero-shot accuracy 97.7, 97.3 and 97.4 % on the 10,000 test images (seeds 0, 1 and 2;
           the five languages differ by at most 0.1 points); in Portuguese 97.7, 92.8 and 75.9 %,
           in Dutch 86.0, 61.7 and 78.6 %. Chance is 10 %

Captions are made from the labels. Texts are bytes, so that the numerals of related languages look
alike: Portuguese and Dutch are scored, but no caption of training is in either of them. Of their
numerals three and one are spelled as in a language of training, so that knowing these and guessing
the others gives about 37 and 19 %. Images have three equal channels, so that the pipeline
zero-shot-image-classification of transformers can run the exported model.
"""

from flax_transformers.checkpointing.config import CheckpointConfig
from flax_transformers.data.images.augmentation import Augmentation
from flax_transformers.data.images.image_text import ClassTexts, ImageTextData
from flax_transformers.data.images.kinds import ImageSource
from flax_transformers.data.tokenizers.load import TokenizerConfig
from flax_transformers.families.clip import ClipConfig, ClipVision
from flax_transformers.objectives.contrastive import ImageTextContrastive
from flax_transformers.optim.optimizers import AdamW
from flax_transformers.optim.schedules import Schedule
from flax_transformers.training.config import Evaluation, Phase, TrainConfig

MEAN, STD = 0.1307, 0.3081  # of the training images


def texts(language: str, numerals: str, *templates: str) -> ClassTexts:
    return ClassTexts(tuple(numerals.split()), ("{}", *templates), language)


CAPTIONS = (
    texts("en", "zero one two three four five six seven eight nine", "the digit {}", "number {}"),
    texts("de", "null eins zwei drei vier fünf sechs sieben acht neun", "die Ziffer {}", "Zahl {}"),
    texts("fr", "zéro un deux trois quatre cinq six sept huit neuf", "le chiffre {}", "nombre {}"),
    texts("es", "cero uno dos tres cuatro cinco seis siete ocho nueve", "la cifra {}", "número {}"),
    texts("it", "zero uno due tre quattro cinque sei sette otto nove", "la cifra {}", "numero {}"),
)
NOT_TRAINED = (
    texts("pt", "zero um dois três quatro cinco seis sete oito nove"),
    texts("nl", "nul een twee drie vier vijf zes zeven acht negen"),
)


def get_config() -> TrainConfig:
    return TrainConfig(
        model=ClipConfig(
            vocab_size=262,
            hidden_size=64,
            num_layers=2,
            num_heads=4,
            intermediate_size=256,
            max_positions=24,
            projection_dim=64,
            pad_id=0,
            bos_id=None,
            eos_ids=(1,),
            vision=ClipVision(
                image_size=28,
                patch_size=7,
                hidden_size=64,
                num_layers=4,
                num_heads=4,
                intermediate_size=256,
                init_std=0.1,
            ),
        ),
        objective=ImageTextContrastive(image_size=28, mean=(MEAN,), std=(STD,)),
        data=ImageTextData(
            source=ImageSource("data/mnist"),
            channels=3,
            crop_fraction=1.0,
            augmentation=Augmentation(crop="shift", padding=2),
            tokenizer=TokenizerConfig("bytes"),
            captions=CAPTIONS,
            zero_shot=CAPTIONS + NOT_TRAINED,
        ),
        optimizer=AdamW(
            learning_rate=2e-3,
            weight_decay=0.05,
            schedule=Schedule("cosine", warmup_steps=200),
        ),
        phases=(Phase(steps=2000, sequence_length=24, batch_size=64),),
        checkpoints=CheckpointConfig(every_steps=1000),
        evaluation=Evaluation(every_steps=500, batch_size=250),
        seed=0,
    )
